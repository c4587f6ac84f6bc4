"""Samples to rows of a fixed length, without cross-talk.

Dims: B rows, T tokens of a row, P patches of all images, N images.
"""

import numpy as np
import torch


def share_trunk(samples):
    """Several questions to one picture as one sample, in which the picture stands once.

    The common beginning of all samples (the trunk, branch 0) is kept once; what differs follows as branches 1, 2, ...
    whose positions continue from the trunk. Under `attention_masks` each branch computes exactly what its sample
    computes alone, at a fraction of the tokens.

    Args:
        samples: dicts of `VoraProcessor.training_sample` that begin with the same images.

    Returns:
        dict: input_ids, targets, position_ids, branch_ids int[T], and the images of the first sample.
    """
    samples = [{**sample, **next_targets(sample)} for sample in samples]
    first = samples[0]
    trunk = _common_beginning(samples)
    parts = {
        "input_ids": [first["input_ids"][:trunk]],
        "targets": [first["targets"][:trunk]],
        "position_ids": [np.arange(trunk)],
        "branch_ids": [np.zeros(trunk, int)],
    }
    for branch, sample in enumerate(samples, start=1):
        length = len(sample["input_ids"]) - trunk
        parts["input_ids"].append(sample["input_ids"][trunk:])
        parts["targets"].append(sample["targets"][trunk:])
        parts["position_ids"].append(np.arange(trunk, trunk + length))
        parts["branch_ids"].append(np.full(length, branch))
    images = {name: first[name] for name in ("pixel_values", "image_grid_thw") if name in first}
    return {name: np.concatenate(arrays) for name, arrays in parts.items()} | images


def image_only(sample, image_token_id):
    """A sample of `share_trunk` cut after its last image token, with nothing to predict: enough to distill from."""
    length = int(np.flatnonzero(sample["input_ids"] == image_token_id).max()) + 1
    names = ("input_ids", "targets", "position_ids", "branch_ids")
    return {**sample, **{name: sample[name][:length] for name in names}, "targets": np.full(length, -100)}


def next_targets(sample):
    """Labels to targets: what each place should predict. Tokens that predict nothing at the end are dropped."""
    targets = np.append(sample["labels"][1:], -100)
    length = int(np.flatnonzero(targets != -100).max(initial=-1)) + 1
    return {"input_ids": sample["input_ids"][:length], "targets": targets[:length]}


def _common_beginning(samples):
    """Tokens shared by all samples, short of the place where they first predict something."""
    shortest = min(len(sample["input_ids"]) for sample in samples)
    ids = np.stack([sample["input_ids"][:shortest] for sample in samples])
    targets = np.stack([sample["targets"][:shortest] for sample in samples])
    # the trunk's last place would predict another token in each branch, so it must predict nothing in all
    apart = (ids != ids[0]).any(0) | (targets != -100).any(0)
    return int(apart.argmax()) if apart.any() else shortest


def fill_rows(lengths, row_tokens):
    """Assign samples to rows, first fit in order, looking back over the last few open rows.

    Args:
        lengths: tokens of each sample, in order.
        row_tokens: tokens that a row holds.

    Returns:
        list of rows, each a list of indices into `lengths`; a row is complete when it leaves the window.

    Raises:
        ValueError: a sample is longer than a row.
    """
    rows, room, window = [], [], 16
    for index, length in enumerate(lengths):
        if length > row_tokens:
            raise ValueError(
                f"Sample {index} has {length} tokens, but a row holds {row_tokens}: raise row_tokens in the recipe."
            )
        for row in range(max(0, len(rows) - window), len(rows)):
            if room[row] >= length:
                break
        else:
            rows.append([])
            room.append(row_tokens)
            row = len(rows) - 1
        rows[row].append(index)
        room[row] -= length
    return rows


def collate_rows(rows, row_tokens, pad_token_id):
    """Rows of samples to one batch.

    Args:
        rows: list of B lists of samples of `share_trunk`.

    Returns:
        dict: input_ids, targets, position_ids, document_ids, branch_ids int[B, T]; pixel_values float[P, C*p*p] and
        image_grid_thw int[N, 3] if any sample has images. Padding is a document of its own (-1).
    """
    fill = {"input_ids": pad_token_id, "targets": -100, "position_ids": 0, "document_ids": -1, "branch_ids": 0}
    batch = {name: np.full((len(rows), row_tokens), value) for name, value in fill.items()}
    for row, samples in enumerate(rows):
        start = 0
        for document, sample in enumerate(samples):
            end = start + len(sample["input_ids"])
            for name in ("input_ids", "targets", "position_ids", "branch_ids"):
                batch[name][row, start:end] = sample[name]
            batch["document_ids"][row, start:end] = document
            start = end
    batch = {name: torch.from_numpy(array) for name, array in batch.items()}
    with_images = [sample for samples in rows for sample in samples if "pixel_values" in sample]
    for name in ("pixel_values", "image_grid_thw"):
        if with_images:
            batch[name] = torch.from_numpy(np.concatenate([sample[name] for sample in with_images]))
    return batch
