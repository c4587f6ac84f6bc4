"""How full packed sequences of a length get with samples of some lengths, and which length fills best."""

from collections.abc import Sequence

import numpy as np

from vora.data.packing import next_sequence
from vora.data.samples import CHUNK_SAMPLES, Chunks, unpacked
from vora.data.stream import WAITING, PackedSequences

NEAR = 0.25  # lengths are tried up to so much below and above
NUM_TRIED, NUM_PACKED = 32, 4000  # lengths, and samples packed for each
NUM_READ = 512  # samples of the mixture, to choose a length before training
EQUAL = 0.005  # what fills as well: the nearest is taken


def share_filled(sizes: Sequence[int], sequence_length: int) -> float:
    """The share of the places in packed sequences that hold a token, of samples of `sizes` in the order drawn."""
    if not len(sizes):
        return 0.0
    if len(sizes) < WAITING:  # training would draw them again and again
        sizes = (list(sizes) * WAITING)[:WAITING]
    waiting: list[int] = []
    filled: list[int] = []
    for size in sizes:
        waiting.append(size)
        if len(waiting) == WAITING:
            chosen = {*next_sequence(waiting, sequence_length)}
            filled.append(sum(waiting[index] for index in chosen))
            waiting = [one for index, one in enumerate(waiting) if index not in chosen]
    return sum(filled) / (len(filled) * sequence_length)


def best_length(sizes: Sequence[int], near: int, most: int | None = None) -> tuple[int, float]:
    """(sequence length, share of its places that are filled): of the lengths near one, none shorter than the longest
    sample or longer than `most`, that which fills best, and `near` itself where no other is better."""
    sizes = sizes[:NUM_PACKED]
    base = max(near, *sizes)
    step = max(8, 2 * int(NEAR * base) // NUM_TRIED // 8 * 8)
    least = max(int((1 - NEAR) * base), *sizes)
    tried = {near, *range(-(-least // step) * step, int((1 + NEAR) * base) + 1, step)}
    shares = {length: share_filled(sizes, length) for length in tried if max(sizes) <= length <= (most or length)}
    if not shares:  # no sample of the longest fits what the LLM reads
        return most or near, share_filled([size for size in sizes if size <= (most or near)], most or near)
    best = max(shares.values())
    if shares.get(near, 0) >= best - 2 * EQUAL:
        return near, shares[near]
    chosen = min((abs(length - near), length) for length, share in shares.items() if share >= best - EQUAL)[1]
    return chosen, shares[chosen]


def length_that_fits(sequences: PackedSequences, near: int, most: int | None = None) -> int:
    """The best length near one for the first samples of a mixture, of which the longest hundredth may be lost. It is
    the same in each process and after a restart; `sequences` keep their position."""
    maker = sequences.maker
    chunks = Chunks(maker, sequences.mixture, False, 0, 1)
    drawn = [sample for number in range(NUM_READ // CHUNK_SAMPLES) for _, sample in unpacked(chunks[number][1])]
    sizes = []
    for sample in drawn:
        if isinstance(sample, dict):
            size, is_cut = len(sample["input_ids"]), maker.text_kl_weight and "pixel_values" not in sample
            sizes.append(min(size, near) if is_cut else size)
    if not sizes:
        return min(near, most or near)
    longest = max(near, float(np.quantile(sizes, 0.99)))
    return best_length([size for size in sizes if size <= longest], near, most)[0]
