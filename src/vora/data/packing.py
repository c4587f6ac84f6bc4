"""Samples to rows of a fixed length, without cross-talk.

Dims: B rows, T tokens of a row, P patches of all images, N images.
"""

import numpy as np
import torch

from vora.model.attention import image_blocks

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")


def sample_of_record(record, processor, conversations, **images_kwargs):
    """A record with some of its conversations as one sample of `share_prefixes`; its images are read once.

    Args:
        images_kwargs: for the image processor, such as `max_image_tokens`.

    Raises:
        ValueError: an image cannot be read, or a conversation does not fit the record.
    """
    if not conversations:
        raise ValueError("It has 0 conversations: there is nothing to learn.")
    opened, samples, image_inputs = record.open_images(), [], None
    for conversation in conversations:
        if conversation[0]["role"] == "text":
            samples.append(processor.text_sample(conversation[0]["content"]))
            continue
        messages = record.messages(opened, conversation)
        samples.append(processor.training_sample(messages, image_inputs, **images_kwargs))
        image_inputs = {name: samples[0][name] for name in IMAGE_INPUTS if name in samples[0]}
    if image_inputs and not _begin_with_images(samples, processor.image_token_id):
        return side_by_side([share_prefixes([sample]) for sample in samples])
    return share_prefixes(samples)


def _begin_with_images(samples, image_token_id):
    """Whether all agree up to their last image token, so that their images can stand once."""
    first = samples[0]["input_ids"]
    length = int(np.flatnonzero(first == image_token_id).max()) + 1
    return all(
        np.array_equal(sample["input_ids"][:length], first[:length]) and (sample["labels"][: length + 1] == -100).all()
        for sample in samples
    )


def side_by_side(samples):
    """Samples of `share_prefixes` as one that shares nothing."""
    starts = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)])
    names = ("input_ids", "targets", "position_ids", *(name for name in IMAGE_INPUTS if name in samples[0]))
    whole = {name: np.concatenate([sample[name] for sample in samples]) for name in names}
    for name in ("seen_until", "ends"):
        whole[name] = np.concatenate([start + sample[name] for start, sample in zip(starts, samples)])
    return whole | {"num_samples": sum(sample["num_samples"] for sample in samples)}


def share_prefixes(samples):
    """Several questions to one image as one sample, in which the image, and all words that they begin with alike,
    stand once.

    The samples become a tree, written depth first: a token is seen by what follows it up to `seen_until`, the last
    token below it, and no further. So under `attention_masks` each question computes exactly what its sample computes
    alone, at a fraction of the tokens. What has something to predict is never shared.

    Args:
        samples: dicts of `VoraProcessor.training_sample` that begin with the same images.

    Returns:
        dict: input_ids, targets, position_ids, seen_until int[T]; ends, the place of each sample's last token, in the
        order given; num_samples; and the images of the first sample.

    Raises:
        ValueError: a sample has nothing to predict.
    """
    samples = [{**sample, **next_targets(sample)} for sample in samples]
    if silent := sum(len(sample["input_ids"]) == 0 for sample in samples):
        raise ValueError(
            f"All labels of {silent} of its {len(samples)} conversations are masked: no token of an assistant is left "
            "to learn."
        )
    order = sorted(range(len(samples)), key=lambda i: samples[i]["input_ids"].tolist())
    path, paths, parts = np.zeros(0, int), {}, []
    for index, before in zip(order, [None, *order]):
        sample = samples[index]
        shared = 0 if before is None else _num_shared(samples[before], sample)
        start, length = sum(len(part["input_ids"]) for part in parts), len(sample["input_ids"])
        path = np.concatenate([path[:shared], np.arange(start, start + length - shared)])
        paths[index] = path
        parts.append(
            {name: sample[name][shared:] for name in ("input_ids", "targets")}
            | {"position_ids": np.arange(shared, length)}
        )
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    whole["seen_until"] = np.zeros(len(whole["input_ids"]), int)
    for path in paths.values():  # depth first, so each ends later than those before
        whole["seen_until"][path] = path[-1]
    images = {name: samples[0][name] for name in IMAGE_INPUTS if name in samples[0]}
    ends = np.array([paths[index][-1] for index in range(len(samples))])
    return whole | {"ends": ends, "num_samples": len(samples)} | images


def cut_after_images(sample, image_token_id):
    """A sample of `share_prefixes` cut after its last image token, with nothing to predict: enough to distill from."""
    length = int(np.flatnonzero(sample["input_ids"] == image_token_id).max()) + 1
    return _cut(sample, length) | {"num_samples": 1}


def text_to_keep(sample, sequence_length):
    """A text-only sample of `share_prefixes` with nothing to predict, cut to a row."""
    return _cut(sample, min(len(sample["input_ids"]), sequence_length))


def _cut(sample, length):
    """The first so many tokens of a sample, with nothing to predict."""
    return {
        **sample,
        "input_ids": sample["input_ids"][:length],
        "targets": np.full(length, -100),
        "position_ids": sample["position_ids"][:length],
        "seen_until": sample["seen_until"][:length].clip(max=length - 1),
        "ends": np.array([length - 1]),
    }


def kept_places(rows, sequence_length):
    """Where a batch has text to keep, for `Objective.forward`: text_rows int[R] and text_places int[L], if any.

    Args:
        rows: list of B lists of samples; those with text to keep have nothing else.
    """
    text = [index for index, samples in enumerate(rows) if "pixel_values" not in samples[0]]
    if not text:
        return {}
    lengths = [sum(len(sample["input_ids"]) for sample in rows[index]) for index in text]
    places = [number * sequence_length + torch.arange(length) for number, length in enumerate(lengths)]
    return {"text_rows": torch.tensor(text), "text_places": torch.cat(places)}


def next_targets(sample):
    """Labels to targets: what each place should predict. Tokens that predict nothing at the end are dropped."""
    targets = np.append(sample["labels"][1:], -100)
    length = int(np.flatnonzero(targets != -100).max(initial=-1)) + 1
    return {"input_ids": sample["input_ids"][:length], "targets": targets[:length]}


def _num_shared(first, second):
    """Leading tokens that are the same in both and predict nothing in either."""
    length = min(len(first["input_ids"]), len(second["input_ids"]))
    apart = first["input_ids"][:length] != second["input_ids"][:length]
    apart |= (first["targets"][:length] != -100) | (second["targets"][:length] != -100)
    return int(apart.argmax()) if apart.any() else length


def next_sequence(lengths, sequence_length):
    """Choose the samples of the next row: the oldest, then again and again the longest that still fits.

    Args:
        lengths: tokens of each waiting sample, oldest first.
        sequence_length: tokens that a row holds, at least as many as the oldest has.

    Returns:
        list of indices into `lengths`, in order.
    """
    lengths = np.asarray(lengths)
    row, room = [0], sequence_length - lengths[0]
    for index in 1 + np.argsort(-lengths[1:], kind="stable"):
        if lengths[index] <= room:
            row.append(int(index))
            room -= lengths[index]
    return sorted(row)


def collate_sequences(rows, sequence_length, pad_token_id):
    """Rows of samples to one batch.

    Args:
        rows: list of B lists of samples of `share_prefixes`.

    Returns:
        dict: input_ids, targets, position_ids, seen_until int[B, T]; num_samples int[]; pixel_values float[P, C*p*p]
        and image_grid_thw int[N, 3] if any sample has images. Padding is seen by itself alone.
    """
    fill = {"input_ids": pad_token_id, "targets": -100, "position_ids": 0, "seen_until": np.arange(sequence_length)}
    batch = {name: np.full((len(rows), sequence_length), value) for name, value in fill.items()}
    for row, samples in enumerate(rows):
        start = 0
        for sample in samples:
            end = start + len(sample["input_ids"])
            for name in ("input_ids", "targets", "position_ids"):
                batch[name][row, start:end] = sample[name]
            batch["seen_until"][row, start:end] = start + sample["seen_until"]
            start = end
    batch["num_samples"] = np.array(sum(sample["num_samples"] for samples in rows for sample in samples))
    with_images = [sample for samples in rows for sample in samples if "pixel_values" in sample]
    for name in IMAGE_INPUTS:
        if with_images:
            batch[name] = np.concatenate([sample[name] for sample in with_images])
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def label_weights(batch, answer_balance):
    """How much each label token counts: float[L], in the order of `label_places`.

    A label token of an answer of n tokens counts n^-answer_balance: with 0 all tokens count alike, so that a caption
    counts as much as four names of classes; with 1 all answers do; 0.5 is the square averaging of InternVL2.5
    (arXiv 2412.05271). An answer is a run of label tokens that follow each other in their conversation; a text without
    turns is one answer, however long, so with 1 texts that are to be learned need a larger share.
    """
    wanted = (batch["targets"] != -100).numpy()
    positions = batch["position_ids"].numpy()
    follows = np.zeros_like(wanted)
    follows[:, 1:] = wanted[:, :-1] & (positions[:, 1:] == positions[:, :-1] + 1)
    answers = np.cumsum((wanted & ~follows)[wanted]) - 1
    lengths = np.bincount(answers)[answers]
    return torch.from_numpy(lengths.astype(np.float32) ** -answer_balance)


def places(batch, image_token_id, patch_merge=1):
    """What a step must know of a batch before it can go on, told by the processor, so that it never waits for a GPU.

    Returns:
        dict: label_places int[L] and, with images, image_places int[I], see `Objective.forward`, and image_numbers
        int[B, T], see `VoraModel.forward`.

    Raises:
        ValueError: image tokens and images do not match.
    """
    found = {"label_places": (batch["targets"] != -100).flatten().nonzero()[:, 0]}
    if "image_grid_thw" in batch:
        is_image = batch["input_ids"] == image_token_id
        found["image_places"] = is_image.flatten().nonzero()[:, 0]
        found["image_numbers"] = image_blocks(is_image, batch["image_grid_thw"], patch_merge)
    return found
