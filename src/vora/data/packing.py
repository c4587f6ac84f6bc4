"""Samples to packed sequences of a fixed length, without cross-talk.

Dims: B packed sequences of a batch, T their tokens, L label tokens, I image tokens, P patches of all images, N images.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict

import numpy as np
import torch

from vora.data.schema import Sample
from vora.data.turns import Conversation
from vora.model.attention import image_blocks
from vora.model.processing_vora import VoraProcessor

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")


class TokenSample(TypedDict, total=False):
    """A sample as tokens, see `share_prefixes`; without images the last two are missing."""

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    seen_until: np.ndarray
    ends: np.ndarray
    num_samples: int
    pixel_values: np.ndarray
    image_grid_thw: np.ndarray


PackedSequence: TypeAlias = list[TokenSample]


class Batch(TypedDict, total=False):
    """What a training step takes; see `Objective.forward`."""

    input_ids: torch.Tensor  # int[B, T], as the next three
    targets: torch.Tensor
    position_ids: torch.Tensor
    seen_until: torch.Tensor
    num_samples: torch.Tensor  # int[]
    pixel_values: torch.Tensor  # float[P, C*p*p]
    image_grid_thw: torch.Tensor  # int[N, 3]
    label_places: torch.Tensor  # int[L]
    image_places: torch.Tensor  # int[I]
    image_numbers: torch.Tensor  # int[B, T]
    label_weights: torch.Tensor  # float[L]
    text_rows: torch.Tensor  # int: sequences of text alone
    text_places: torch.Tensor  # int: their tokens, counted among those sequences alone
    distill_only: torch.Tensor  # bool[]


def tokenize_sample(
    sample: Sample, processor: VoraProcessor, conversations: Sequence[Conversation], **images_kwargs: Any
) -> TokenSample:
    """A sample with some of its conversations as tokens; its images are read once.

    Args:
        images_kwargs: for the image processor, such as `max_image_tokens`.

    Raises:
        ValueError: an image cannot be read, or a conversation does not fit the images.
    """
    if not conversations:
        raise ValueError("It has 0 conversations: there is nothing to learn.")
    opened, found, image_inputs = sample.open_images(), [], None
    for conversation in conversations:
        if conversation[0]["role"] == "text":
            found.append(processor.text_sample(conversation[0]["content"]))
            continue
        messages = sample.messages(opened, conversation)
        found.append(processor.training_sample(messages, image_inputs, **images_kwargs))
        image_inputs = {name: found[0][name] for name in IMAGE_INPUTS if name in found[0]}
    if image_inputs and not _begin_with_images(found, processor.image_token_id):
        return side_by_side([share_prefixes([one]) for one in found])
    return share_prefixes(found)


def _begin_with_images(samples: Sequence[dict[str, Any]], image_token_id: int) -> bool:
    """Whether all agree up to their last image token, so that their images can stand once."""
    first = samples[0]["input_ids"]
    length = int(np.flatnonzero(first == image_token_id).max()) + 1
    return all(
        np.array_equal(sample["input_ids"][:length], first[:length]) and (sample["labels"][: length + 1] == -100).all()
        for sample in samples
    )


def side_by_side(samples: Sequence[TokenSample]) -> TokenSample:
    """Samples as one that shares nothing."""
    starts = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)])
    names = ("input_ids", "targets", "position_ids", *(name for name in IMAGE_INPUTS if name in samples[0]))
    each: list[dict[str, Any]] = [dict(sample) for sample in samples]
    whole = {name: np.concatenate([one[name] for one in each]) for name in names}
    for name in ("seen_until", "ends"):
        whole[name] = np.concatenate([start + one[name] for start, one in zip(starts, each)])
    return _token_sample(whole | {"num_samples": sum(one["num_samples"] for one in each)})


def _token_sample(arrays: dict[str, Any]) -> TokenSample:
    return TokenSample(**arrays)  # type: ignore[typeddict-item]


def share_prefixes(samples: Sequence[dict[str, Any]]) -> TokenSample:
    """Several questions to one image as one sample, in which the image, and all text that they begin with alike,
    stand once.

    The samples become a tree, written depth first: a token is seen by what follows it up to `seen_until`, the last
    token below it, and no further. So under `attention_masks` each question computes exactly what its sample computes
    alone, at a fraction of the tokens. What has something to predict is never shared.

    Args:
        samples: of `VoraProcessor.training_sample`; they begin with the same images.

    Returns:
        input_ids, targets, position_ids, seen_until int[T]; ends, the place of each sample's last token, in the order
        given; num_samples; and the images of the first sample.

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
    path = np.zeros(0, int)
    paths: dict[int, np.ndarray] = {}
    parts: list[dict[str, np.ndarray]] = []
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
    return _token_sample(whole | {"ends": ends, "num_samples": len(samples)} | images)


def cut_after_images(sample: TokenSample, image_token_id: int) -> TokenSample:
    """A sample cut after its last image token, with nothing to predict: enough to distill from."""
    length = int(np.flatnonzero(sample["input_ids"] == image_token_id).max()) + 1
    return {**_without_targets(sample, length), "num_samples": 1}


def cut_text(sample: TokenSample, sequence_length: int) -> TokenSample:
    """A sample of text alone with nothing to predict, cut to a packed sequence: enough to be kept as it was."""
    return _without_targets(sample, min(len(sample["input_ids"]), sequence_length))


def _without_targets(sample: TokenSample, length: int) -> TokenSample:
    """The first so many tokens of a sample, with nothing to predict."""
    found = sample.copy()
    found["input_ids"], found["targets"] = sample["input_ids"][:length], np.full(length, -100)
    found["position_ids"] = sample["position_ids"][:length]
    found["seen_until"] = sample["seen_until"][:length].clip(max=length - 1)
    found["ends"] = np.array([length - 1])
    return found


def places_of_text(sequences: Sequence[PackedSequence], sequence_length: int) -> Batch:
    """Where a batch has text without images, which is to be kept: text_rows and text_places, if there is any.

    Args:
        sequences: those with such text have nothing else.
    """
    text = [index for index, samples in enumerate(sequences) if "pixel_values" not in samples[0]]
    if not text:
        return {}
    lengths = [sum(len(sample["input_ids"]) for sample in sequences[index]) for index in text]
    found = [number * sequence_length + torch.arange(length) for number, length in enumerate(lengths)]
    return {"text_rows": torch.tensor(text), "text_places": torch.cat(found)}


def next_targets(sample: dict[str, Any]) -> dict[str, np.ndarray]:
    """Labels to targets: what each place should predict. Tokens that predict nothing at the end are dropped."""
    targets = np.append(sample["labels"][1:], -100)
    length = int(np.flatnonzero(targets != -100).max(initial=-1)) + 1
    return {"input_ids": sample["input_ids"][:length], "targets": targets[:length]}


def _num_shared(first: dict[str, Any], second: dict[str, Any]) -> int:
    """Leading tokens that are the same in both and predict nothing in either."""
    length = min(len(first["input_ids"]), len(second["input_ids"]))
    apart = first["input_ids"][:length] != second["input_ids"][:length]
    apart |= (first["targets"][:length] != -100) | (second["targets"][:length] != -100)
    return int(apart.argmax()) if apart.any() else length


def next_sequence(lengths: Sequence[int], sequence_length: int) -> list[int]:
    """Choose the samples of the next sequence: the oldest, then again and again the longest that still fits.

    Args:
        lengths: tokens of each waiting sample, oldest first.
        sequence_length: T, at least as many as the oldest has.

    Returns:
        Indices into `lengths`, in order.
    """
    sizes = np.asarray(lengths)
    chosen, room = [0], sequence_length - sizes[0]
    for index in 1 + np.argsort(-sizes[1:], kind="stable"):
        if sizes[index] <= room:
            chosen.append(int(index))
            room -= sizes[index]
    return sorted(chosen)


def collate_sequences(sequences: Sequence[PackedSequence], sequence_length: int, pad_token_id: int) -> Batch:
    """Packed sequences to one batch, its images together, if there are any. Padding is seen by itself alone."""
    fill: dict[str, Any] = {"input_ids": pad_token_id, "targets": -100, "position_ids": 0}
    fill["seen_until"] = np.arange(sequence_length)
    batch = {name: np.full((len(sequences), sequence_length), value) for name, value in fill.items()}
    for number, samples in enumerate(sequences):
        start = 0
        for sample in samples:
            end = start + len(sample["input_ids"])
            batch["input_ids"][number, start:end] = sample["input_ids"]
            batch["targets"][number, start:end] = sample["targets"]
            batch["position_ids"][number, start:end] = sample["position_ids"]
            batch["seen_until"][number, start:end] = start + sample["seen_until"]
            start = end
    every = [sample for samples in sequences for sample in samples]
    batch["num_samples"] = np.array(sum(sample["num_samples"] for sample in every))
    if seeing := [sample for sample in every if "pixel_values" in sample]:
        batch["pixel_values"] = np.concatenate([sample["pixel_values"] for sample in seeing])
        batch["image_grid_thw"] = np.concatenate([sample["image_grid_thw"] for sample in seeing])
    return Batch(**{name: torch.from_numpy(array) for name, array in batch.items()})  # type: ignore[typeddict-item]


def label_weights(batch: Batch, answer_balance: float) -> torch.Tensor:
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


def places(batch: Batch, image_token_id: int, patch_merge: int = 1) -> Batch:
    """What a step must know of a batch before it can go on, found on the CPU, so that it never waits for a GPU.

    Returns:
        label_places and, with images, image_places and image_numbers, see `VoraModel.forward`.

    Raises:
        ValueError: image tokens and images do not match.
    """
    found: Batch = {"label_places": (batch["targets"] != -100).flatten().nonzero()[:, 0]}
    if "image_grid_thw" in batch:
        is_image = batch["input_ids"] == image_token_id
        found["image_places"] = is_image.flatten().nonzero()[:, 0]
        found["image_numbers"] = image_blocks(is_image, batch["image_grid_thw"], patch_merge)
    return found
