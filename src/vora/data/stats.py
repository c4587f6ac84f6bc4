"""A mixture read before any training: what is in it, what is bad, how well it packs."""

import json
import random
import time
from array import array
from itertools import islice

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from vora.data.order import SourceOrder
from vora.data.packing import next_sequence
from vora.data.schema import Record
from vora.data.stream import WAITING, as_bad, as_it_is

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
PACKED_AT_MOST = 20_000  # samples of the mixture that are packed to see how full rows get


class Blocks(IterableDataset):
    """Every record of every source, made into a sample and measured, block by block; a worker takes its share.

    Yields (source, first row of the block, list of dicts of measures, or of `name` and `cause` of a bad one).
    """

    def __init__(self, maker):
        self.maker = maker

    def __iter__(self):
        worker = get_worker_info()
        mine, of = (0, 1) if worker is None else (worker.id, worker.num_workers)
        blocks = ((s, b) for s, source in enumerate(self.maker.sources) for b in range(len(source.block_sizes)))
        for number, block in islice(blocks, mine, None, of):
            source = self.maker.sources[number]
            rows = source.read_block(block)
            first = int(source.starts[block])
            yield number, first, [self._measured(number, block, i, rows) for i in range(source.block_sizes[block])]

    def _measured(self, number, block, offset, rows):
        source = self.maker.sources[number]
        try:
            record = source.record(block, offset, rows)
            opened = record.open_images()
            rng = random.Random(f"{self.maker.seed}/{number}/{source.starts[block] + offset}")
            # the images are open already, so they are not read again
            sample = self.maker.sample_of(
                Record(record.name, opened, record.conversations), rng, self.maker.questions_per_image
            )
        except Exception as error:
            return {"name": source.row_name(block, offset), "cause": str(as_bad(error))}
        tokens = [
            int(grid.prod()) // self.maker.processor.image_processor.patch_merge**2
            for grid in sample.get("image_grid_thw", ())
        ]
        first_frames = [image[0] if isinstance(image, list) else image for image in opened]
        return {
            "num_tokens": len(sample["input_ids"]),
            "num_labels": int((sample["targets"] != -100).sum()),
            "num_conversations": sample["num_samples"],
            "image_sizes": [image.size for image in first_frames],
            "image_tokens": tokens,
        }


PER_SAMPLE = ("mean_labels", "mean_images", "mean_image_tokens")


def dataset_statistics(rows, names, num_workers=0, progress=None):
    """Read every record of a mixture once.

    Args:
        rows: the `PackedSequences` of the training to come; its position stays.
        names: of the sources.
        num_workers: processes that read.
        progress: called with the number of records done.

    Returns:
        (summary: dict for JSON, bad: list of {record, cause}). The summary's `shares_by_source` are of the samples of
        the mixture, `packing_efficiency` is the share of the positions of its rows that hold a sample.
    """
    start, maker = time.monotonic(), rows.maker
    lengths = [np.zeros(len(source), np.int32) for source in maker.sources]  # 0: bad
    measures = {name: array("i") for name in ("num_labels", "num_conversations", "image_tokens", "width", "height")}
    totals = np.zeros((len(maker.sources), 3))  # labels, images and image tokens of each source
    bad = [[] for _ in maker.sources]
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
    drawn, efficiency = packed_mixture(rows, lengths)
    tokens = np.array([drawn[s].sum() for s in range(len(lengths))], float)
    counts = np.array([len(drawn[s]) for s in range(len(lengths))], float)
    edges = np.histogram_bin_edges(good, bins=min(24, max(1, len(set(good.tolist()))))) if len(good) else []
    summary = {
        "num_samples": len(good),
        "num_bad": sum(map(len, bad)),
        "num_conversations": int(sum(measures["num_conversations"])),
        "num_images": len(measures["width"]),
        "packing_efficiency": efficiency,
        "sequence_length": rows.sequence_length,
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


def packed_mixture(rows, lengths):
    """({source: tokens of its samples}, share of filled positions) of the first rows of a mixture.

    Args:
        lengths: per source int[rows], tokens of each sample, 0 where it is bad.
    """
    num_drawn = min(PACKED_AT_MOST, max(sum(map(len, lengths)), 200))
    orders = [
        SourceOrder(source.block_sizes, order.seed) for source, order in zip(rows.maker.sources, rows.maker.orders)
    ]
    starts = [source.starts for source in rows.maker.sources]
    drawn, numbers, waiting = {s: [] for s in range(len(lengths))}, [0] * len(lengths), []
    num_rows = num_tokens = 0
    for source in rows.mixture.sources(0, num_drawn).tolist():
        _, _, block, offset = orders[source].draw(numbers[source])
        numbers[source] += 1
        length = int(lengths[source][starts[source][block] + offset])
        if not length:
            continue
        drawn[source].append(length)
        waiting.append(length)
        if len(waiting) == WAITING:
            row = set(next_sequence(waiting, rows.sequence_length))
            num_rows, num_tokens = num_rows + 1, num_tokens + sum(waiting[i] for i in row)
            waiting = [one for i, one in enumerate(waiting) if i not in row]
    if not num_rows and waiting:  # fewer samples than wait for a row: training would draw them again and again
        row = next_sequence((waiting * WAITING)[:WAITING], rows.sequence_length)
        num_rows, num_tokens = 1, sum((waiting * WAITING)[i] for i in row)
    efficiency = num_tokens / (num_rows * rows.sequence_length) if num_rows else 0.0
    return {source: np.array(tokens) for source, tokens in drawn.items()}, efficiency


def percentiles(values):
    """{mean, min, p5, ..., max} of some numbers; empty of none."""
    if len(values) == 0:
        return {}
    names = ["min", *[f"p{p}" for p in PERCENTILES[1:-1]], "max"]
    return {"mean": float(np.mean(values))} | dict(zip(names, np.percentile(values, PERCENTILES).tolist()))


def write_summary(summary, bad, folder):
    """Leave summary.json and, if any are, bad_samples.jsonl in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    lines = "".join(json.dumps(one) + "\n" for one in bad)
    (folder / "bad_samples.jsonl").write_text(lines)
