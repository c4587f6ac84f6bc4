"""Statistics of a dataset, read before any training: what is in it, what is bad, how well it packs."""

import json
import random
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vora.data.order import SourceOrder
from vora.data.packing import next_sequence
from vora.data.samples import SampleMaker, as_bad
from vora.data.stream import WAITING, PackedSequences, as_it_is

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
PACKED_AT_MOST = 20_000  # samples of the mixture that are packed to see how full sequences get
PER_SAMPLE = ("mean_labels", "mean_images", "mean_image_tokens")


class Blocks(IterableDataset):
    """Every row of every source, made into a sample and measured, block by block; a worker takes its share.

    Yields (source, first row of the block, list of dicts of measures, or of `name` and `cause` of a bad one).
    """

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker

    def __iter__(self) -> Iterator[tuple[int, int, list[dict[str, Any]]]]:
        worker = get_worker_info()
        mine, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        blocks = ((s, b) for s, source in enumerate(self.maker.sources) for b in range(len(source.block_sizes)))
        for number, block in islice(blocks, mine, None, of):
            source = self.maker.sources[number]
            rows = source.read_block(block)
            first = int(source.starts[block])
            yield number, first, [self._measured(number, block, i, rows) for i in range(source.block_sizes[block])]

    def _measured(self, number: int, block: int, offset: int, rows: Any) -> dict[str, Any]:
        source, maker = self.maker.sources[number], self.maker
        try:
            sample = source.item(block, offset, rows)
            opened = sample.open_images()
            rng = random.Random(f"{maker.seed}/{number}/{source.starts[block] + offset}")
            # the images are open already, so they are not read again
            found = maker.tokenized(replace(sample, images=opened), rng, maker.questions_per_image)
        except Exception as error:
            return {"name": source.row_name(block, offset), "cause": str(as_bad(error))}
        merged = maker.processor.image_processor.patch_merge**2
        first_frames = [image[0] if isinstance(image, list) else image for image in opened]
        return {
            "num_tokens": len(found["input_ids"]),
            "num_labels": int((found["targets"] != -100).sum()),
            "num_conversations": found["num_samples"],
            "image_sizes": [image.size for image in first_frames],
            "image_tokens": [int(grid.prod()) // merged for grid in found.get("image_grid_thw", ())],
        }


def dataset_statistics(
    sequences: PackedSequences,
    names: Sequence[str],
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read every row of a mixture once.

    Args:
        sequences: of the training to come; their position stays.
        names: of the sources.
        num_workers: processes that read.
        progress: called with the number of rows done.

    Returns:
        A summary for JSON, and for each bad sample its `record`, which is its name, and `cause`. `shares_by_source`
        are of the samples of the mixture, `packing_efficiency` is the share of the places in packed sequences that
        hold a token.
    """
    start, maker = time.monotonic(), sequences.maker
    lengths = [np.zeros(len(source), np.int32) for source in maker.sources]  # 0: bad
    measures = {name: array("i") for name in ("num_labels", "num_conversations", "image_tokens", "width", "height")}
    totals = np.zeros((len(maker.sources), 3))  # labels, images and image tokens of each source
    bad: list[list[dict[str, str]]] = [[] for _ in maker.sources]
    loader = DataLoader(Blocks(maker), batch_size=None, num_workers=num_workers, collate_fn=as_it_is)
    for source, first, block in loader:
        for row, found in enumerate(block, first):
            if "cause" in found:
                bad[source].append({"record": found["name"], "cause": found["cause"]})
                continue
            lengths[source][row] = found["num_tokens"]
            totals[source] += found["num_labels"], len(found["image_tokens"]), sum(found["image_tokens"])
            measures["num_labels"].append(found["num_labels"])
            measures["num_conversations"].append(found["num_conversations"])
            measures["image_tokens"].extend(found["image_tokens"])
            measures["width"].extend(width for width, _ in found["image_sizes"])
            measures["height"].extend(height for _, height in found["image_sizes"])
        if progress is not None:
            progress(len(block))
    good = np.concatenate([one[one > 0] for one in lengths])
    seconds = time.monotonic() - start
    drawn, efficiency = packed_mixture(sequences, lengths)
    tokens = np.array([drawn[s].sum() for s in range(len(lengths))], float)
    counts = np.array([len(drawn[s]) for s in range(len(lengths))], float)
    edges: Any = np.histogram_bin_edges(good, bins=min(24, max(1, len(set(good.tolist()))))) if len(good) else []
    summary = {
        "num_samples": len(good),
        "num_bad": sum(map(len, bad)),
        "num_conversations": int(sum(measures["num_conversations"])),
        "num_images": len(measures["width"]),
        "packing_efficiency": efficiency,
        "sequence_length": sequences.sequence_length,
        "tokens_per_sample": percentiles(good),
        "label_tokens_per_sample": percentiles(measures["num_labels"]),
        "image_tokens_per_image": percentiles(measures["image_tokens"]),
        "image_width": percentiles(measures["width"]),
        "image_height": percentiles(measures["height"]),
        "shares_by_source": dict(zip(names, (counts / max(counts.sum(), 1)).tolist())),
        "sources": [
            {
                "name": name,
                "num_rows": len(one),
                "num_samples": int((one > 0).sum()),
                "num_bad": len(its_bad),
                "share_of_samples": count / max(counts.sum(), 1),
                "share_of_tokens": total / max(tokens.sum(), 1),
                "mean_tokens": float(one[one > 0].mean()) if (one > 0).any() else None,
                **dict(zip(PER_SAMPLE, (sums / max((one > 0).sum(), 1)).tolist())),
            }
            for name, one, its_bad, count, total, sums in zip(names, lengths, bad, counts, tokens, totals)
        ],
        "token_histogram": {
            "edges": [float(edge) for edge in edges],
            "counts": np.histogram(good, edges)[0].tolist() if len(good) else [],
        },
        "seconds": seconds,
        "samples_per_second": len(good) / seconds,
    }
    return summary, [one for its_bad in bad for one in its_bad]


def packed_mixture(sequences: PackedSequences, lengths: Sequence[np.ndarray]) -> tuple[dict[int, np.ndarray], float]:
    """({source: tokens of its samples}, share of filled places) of the first packed sequences of a mixture.

    Args:
        lengths: per source int[rows], tokens of each sample, 0 where it is bad.
    """
    num_drawn = min(PACKED_AT_MOST, max(sum(map(len, lengths)), 200))
    maker, length = sequences.maker, sequences.sequence_length
    orders = [SourceOrder(source.block_sizes, order.seed) for source, order in zip(maker.sources, maker.orders)]
    drawn: dict[int, list[int]] = {source: [] for source in range(len(lengths))}
    numbers = [0] * len(lengths)
    waiting: list[int] = []
    num_sequences = num_tokens = 0
    for source in sequences.mixture.sources(0, num_drawn).tolist():
        _, _, block, offset = orders[source].draw(numbers[source])
        numbers[source] += 1
        size = int(lengths[source][maker.sources[source].starts[block] + offset])
        if not size:
            continue
        drawn[source].append(size)
        waiting.append(size)
        if len(waiting) == WAITING:
            chosen = {*next_sequence(waiting, length)}
            num_sequences, num_tokens = num_sequences + 1, num_tokens + sum(waiting[i] for i in chosen)
            waiting = [one for i, one in enumerate(waiting) if i not in chosen]
    if not num_sequences and waiting:  # fewer samples than wait: training would draw them again and again
        again = (waiting * WAITING)[:WAITING]
        num_sequences, num_tokens = 1, sum(again[i] for i in next_sequence(again, length))
    efficiency = num_tokens / (num_sequences * length) if num_sequences else 0.0
    return {source: np.array(tokens) for source, tokens in drawn.items()}, efficiency


def percentiles(values: "Sequence[int] | np.ndarray | array[int]") -> dict[str, float]:
    """{mean, min, p5, ..., max} of some numbers; empty of none."""
    if len(values) == 0:
        return {}
    names = ["min", *[f"p{p}" for p in PERCENTILES[1:-1]], "max"]
    return {"mean": float(np.mean(values))} | dict(zip(names, np.percentile(values, PERCENTILES).tolist()))


def write_summary(summary: Mapping[str, Any], bad: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Leave summary.json and, if any are, bad_samples.jsonl in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = "".join(json.dumps(one) + "\n" for one in bad)
    (folder / "bad_samples.jsonl").write_text(lines)
