"""Statistics of a dataset, read before any training: what is in it, what is bad, how well it packs."""

import json
import random
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from vora.data.samples import SampleMaker, as_bad
from vora.data.sequence_length import best_length, share_filled
from vora.data.stream import PackedSequences, as_it_is

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
PACKED_AT_MOST = 20_000  # samples of the mixture that are packed to see how full sequences get


class Blocks(Dataset):
    """Every row of every source, made into a sample and measured, block by block: (source, first row of the block,
    list of dicts of measures, or of `record` and `cause` of a bad one)."""

    def __init__(self, maker: SampleMaker) -> None:
        self.maker = maker
        self.places = [(s, b) for s, source in enumerate(maker.sources) for b in range(len(source.block_sizes))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[int, int, list[dict[str, Any]]]:
        number, block = self.places[index]
        source = self.maker.sources[number]
        rows = source.read_block(block)
        measured = [self._measured(number, block, i, rows) for i in range(source.block_sizes[block])]
        return number, int(source.starts[block]), measured

    def _measured(self, number: int, block: int, offset: int, rows: Any) -> dict[str, Any]:
        source, maker = self.maker.sources[number], self.maker
        try:
            sample = source.item(block, offset, rows)
            opened = sample.open_images()
            rng = random.Random(f"{maker.seed}/{number}/{source.starts[block] + offset}")
            # the images are open already, so they are not read again
            found = maker.tokenized(replace(sample, images=opened), rng, maker.questions_per_image)
        except Exception as error:
            return {"record": source.row_name(block, offset), "cause": str(as_bad(error))}
        merged = maker.processor.image_processor.patch_merge**2
        first_frames = [image[0] if isinstance(image, list) else image for image in opened]
        return {
            "row": (len(found["input_ids"]), int((found["targets"] != -100).sum()), found["num_samples"]),
            "image_tokens": [int(grid.prod()) // merged for grid in found.get("image_grid_thw", ())],
            "image_sizes": [side for image in first_frames for side in image.size],
        }


def dataset_statistics(
    sequences: PackedSequences,
    names: Sequence[str],
    num_workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Read every row of a mixture once, `progress` called with the number of rows done; the position of `sequences`
    stays. A summary for JSON, and for each bad sample its `record`, which is its name, and `cause`.
    `shares_by_source` are of the samples of the mixture, `packing_efficiency` is the share of the places in packed
    sequences that hold a token."""
    start, sources = time.monotonic(), sequences.maker.sources
    rows = [np.zeros((len(source), 3), np.int32) for source in sources]  # tokens (0: bad), label tokens, conversations
    image_tokens, image_sizes = [array("i") for _ in sources], array("i")  # sizes: width and height in turns
    bad: list[list[dict[str, str]]] = [[] for _ in sources]
    loader = DataLoader(Blocks(sequences.maker), batch_size=None, num_workers=num_workers, collate_fn=as_it_is)
    for source, first, block in loader:
        for row, found in enumerate(block, first):
            if "cause" in found:
                bad[source].append(found)
                continue
            rows[source][row] = found["row"]
            image_tokens[source].extend(found["image_tokens"])
            image_sizes.extend(found["image_sizes"])
        if progress is not None:
            progress(len(block))
    seconds = time.monotonic() - start
    num_drawn, num_tokens, sizes = drawn_of_mixture(sequences, [one[:, 0] for one in rows])
    length = sequences.sequence_length
    best, best_efficiency = best_length(sizes, length) if sizes else (length, 0.0)
    shares = num_drawn / max(num_drawn.sum(), 1)
    good = [one[one[:, 0] > 0] for one in rows]
    tokens, labels, conversations = np.concatenate(good).T
    counts, edges = np.histogram(tokens, np.clip(len(np.unique(tokens)), 1, 24))
    summary = {
        "num_samples": len(tokens),
        "num_bad": sum(map(len, bad)),
        "num_conversations": int(conversations.sum()),
        "num_images": len(image_sizes) // 2,
        "packing_efficiency": share_filled(sizes, length),
        "sequence_length": length,
        "best_sequence_length": {"sequence_length": best, "packing_efficiency": best_efficiency},
        "tokens_per_sample": percentiles(tokens),
        "label_tokens_per_sample": percentiles(labels),
        "image_tokens_per_image": percentiles(np.concatenate(image_tokens)),
        "image_width": percentiles(image_sizes[::2]),
        "image_height": percentiles(image_sizes[1::2]),
        "shares_by_source": dict(zip(names, shares.tolist())),
        "sources": [
            {
                "name": name,
                "columns": sources[number].columns_read,
                "guessed_columns": [*sources[number].guessed],
                "columns_not_read": sources[number].columns_not_read,
                "num_rows": len(rows[number]),
                "num_samples": len(good[number]),
                "num_bad": len(bad[number]),
                "share_of_samples": float(shares[number]),
                "share_of_tokens": num_tokens[number] / max(num_tokens.sum(), 1),
                "mean_tokens": float(good[number][:, 0].mean()) if len(good[number]) else None,
                "mean_labels": float(good[number][:, 1].sum()) / max(len(good[number]), 1),
                "mean_images": len(image_tokens[number]) / max(len(good[number]), 1),
                "mean_image_tokens": sum(image_tokens[number]) / max(len(good[number]), 1),
            }
            for number, name in enumerate(names)
        ],
        "token_histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "seconds": seconds,
        "samples_per_second": len(tokens) / seconds,
    }
    return summary, sum(bad, [])


def drawn_of_mixture(
    sequences: PackedSequences, lengths: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """What is drawn first from a mixture: samples of each source int[S], their tokens, and the tokens of each sample.
    Of each source `lengths` has int[rows], tokens of each sample, 0 where it is bad."""
    maker, numbers, drawn, sizes = sequences.maker, [count() for _ in lengths], [], []
    num_drawn = min(PACKED_AT_MOST, max(sum(map(len, lengths)), 200))
    for source in sequences.mixture.sources(0, num_drawn).tolist():
        _, _, block, offset = maker.orders[source].draw(next(numbers[source]))
        if size := int(lengths[source][maker.sources[source].starts[block] + offset]):
            drawn.append(source)
            sizes.append(size)
    num_samples = np.bincount(np.array(drawn, int), minlength=len(lengths))
    num_tokens = np.bincount(np.array(drawn, int), sizes, minlength=len(lengths))
    return num_samples, num_tokens, sizes


def percentiles(values: "Sequence[int] | np.ndarray | array[int]") -> dict[str, float]:
    """{mean, min, p5, ..., max} of some numbers; empty of none."""
    if len(values) == 0:
        return {}
    names = ["min", *[f"p{p}" for p in PERCENTILES[1:-1]], "max"]
    return {"mean": float(np.mean(values))} | dict(zip(names, np.percentile(values, PERCENTILES).tolist()))


def write_summary(summary: Mapping[str, Any], bad: Sequence[Mapping[str, str]], folder: Path) -> None:
    """Leave summary.json and bad_samples.jsonl in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "bad_samples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in bad))
