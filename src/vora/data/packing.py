"""Samples to packed sequences of a fixed length, without cross-talk.

Dims: B packed sequences of a batch, T their tokens, L label tokens, I image tokens, P patches of all images, N images.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias, TypedDict, cast

import numpy as np
import torch

from vora.data.schema import Sample
from vora.data.turns import Conversation
from vora.model.attention import image_blocks
from vora.model.processing_vora import SPELT, VoraProcessor

IMAGE_INPUTS = ("pixel_values", "image_grid_thw")
PLACES = ("seen_until", "ends")  # count tokens, so they move with them


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
    branches: torch.Tensor  # int[G, 2], how many images of how many tokens; rows of text are in the next three then
    text_input_ids: torch.Tensor
    text_position_ids: torch.Tensor
    text_seen_until: torch.Tensor
    places: list[list[int]]  # of the samples, see `vora.data.streams.PackedBatches`


def tokenize_sample(
    sample: Sample, processor: VoraProcessor, conversations: Sequence[Conversation], **images_kwargs: Any
) -> TokenSample:
    """A sample with some of its conversations as tokens; its images are read once. `images_kwargs`, such as
    `max_image_tokens`, are the image processor's. ValueError if an image cannot be read, or a conversation does not
    fit the images."""
    if not conversations:
        raise ValueError("It has 0 conversations: there is nothing to learn.")
    opened, found, image_inputs = sample.open_images(), [], None
    for conversation in conversations:
        if conversation[0]["role"] == "text":
            found.append(processor.text_sample(conversation[0]["content"]))
            continue
        messages = sample.messages(opened, conversation)
        _check_is_written(messages, processor)
        found += processor.training_samples(messages, image_inputs, **images_kwargs)
        if len(found[-1].get("image_grid_thw", ())) == len(opened):
            image_inputs = {name: found[-1][name] for name in IMAGE_INPUTS if name in found[-1]}
    if opened and not _begin_with_images(found, processor.image_token_id):
        return side_by_side([share_prefixes([one]) for one in found])
    return share_prefixes(found)


def _check_is_written(messages: Conversation, processor: VoraProcessor) -> None:
    """Raise ValueError where the chat template leaves out what someone says, but for thoughts."""
    written = processor.apply_chat_template(messages).replace(SPELT, "")
    for message in messages:
        said = message["content"]
        texts = [said] if isinstance(said, str) else [part["text"] for part in said if part["type"] == "text"]
        if any(text.rpartition("</think>")[2].strip() not in written for text in texts):
            raise ValueError(
                f"The chat template leaves out what the {message['role']} says: give from_llm another one."
            )


def _begin_with_images(samples: Sequence[dict[str, Any]], image_token_id: int) -> bool:
    """Whether all agree up to their last image token, so that their images can stand once."""
    first = samples[0]["input_ids"]
    length = _length_of_images(first, image_token_id)
    return all(
        _length_of_images(sample["input_ids"], image_token_id) == length
        and np.array_equal(sample["input_ids"][:length], first[:length])
        and (sample["labels"][: length + 1] == -100).all()
        for sample in samples
    )


def _length_of_images(input_ids: np.ndarray, image_token_id: int) -> int:
    """How many tokens there are up to the last image token."""
    return int(np.flatnonzero(input_ids == image_token_id).max(initial=-1)) + 1


def side_by_side(samples: Sequence[TokenSample]) -> TokenSample:
    """Samples as one that shares nothing."""
    starts = np.cumsum([0, *(len(sample["input_ids"]) for sample in samples)])
    each: list[dict[str, Any]] = [dict(sample) for sample in samples]
    whole: dict[str, Any] = {"num_samples": sum(one.pop("num_samples") for one in each)}
    for name in {name: None for one in each for name in one}:
        arrays = [
            one[name] + start if name in PLACES else one[name] for start, one in zip(starts, each) if name in one
        ]
        whole[name] = np.concatenate(arrays)
    return cast(TokenSample, whole)


def share_prefixes(samples: Sequence[dict[str, Any]]) -> TokenSample:
    """Several questions to one image, or answers that each need a prompt of their own, as one sample, in which the
    image, and all text that they begin with alike, stand once.

    The samples become a tree, written depth first: a token is seen by what follows it up to `seen_until`, the last
    token below it, and no further. So under `attention_masks` each question computes exactly what its sample computes
    alone, at a fraction of the tokens. What has something to predict is never shared. The samples are of
    `VoraProcessor.training_sample` and begin with the same images; ValueError if one has nothing to predict.

    Returns:
        input_ids, targets, position_ids, seen_until int[T]; ends, the place of each sample's last token, in the order
        given; num_samples; and the images of the first sample.
    """
    aimed = [_next_targets(sample) for sample in samples]
    if silent := sum(len(ids) == 0 for ids, _ in aimed):
        raise ValueError(
            f"All labels of {silent} of its {len(samples)} conversations are masked: no token of an assistant is left "
            "to learn."
        )
    order = sorted(range(len(samples)), key=lambda index: aimed[index][0].tolist())
    path, num_tokens = np.zeros(0, int), 0
    paths: dict[int, np.ndarray] = {}
    parts: list[tuple[np.ndarray, ...]] = []
    for index, before in zip(order, [None, *order]):
        ids, targets = aimed[index]
        shared = 0 if before is None else _num_shared(aimed[before], aimed[index])
        parts.append((ids[shared:], targets[shared:], np.arange(shared, len(ids))))
        path = np.concatenate([path[:shared], num_tokens + np.arange(len(ids) - shared)])
        paths[index], num_tokens = path, num_tokens + len(ids) - shared
    seen_until = np.zeros(num_tokens, int)
    for path in paths.values():  # depth first, so each ends later than those before
        seen_until[path] = path[-1]
    whole = dict(zip(("input_ids", "targets", "position_ids"), map(np.concatenate, zip(*parts))))
    whole |= {"seen_until": seen_until, "ends": np.array([paths[index][-1] for index in range(len(samples))])}
    whole |= {name: samples[0][name] for name in IMAGE_INPUTS if name in samples[0]}
    return cast(TokenSample, whole | {"num_samples": len(samples)})


def _next_targets(sample: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, what each should predict); those that predict nothing at the end are dropped."""
    targets = np.append(sample["labels"][1:], -100)
    length = int(np.flatnonzero(targets != -100).max(initial=-1)) + 1
    return sample["input_ids"][:length], targets[:length]


def _num_shared(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> int:
    """Leading tokens that are the same in both and predict nothing in either."""
    length = min(len(first[0]), len(second[0]))
    apart = first[0][:length] != second[0][:length]
    apart |= (first[1][:length] != -100) | (second[1][:length] != -100)
    return int(apart.argmax()) if apart.any() else length


def cut_after_images(sample: TokenSample, image_token_id: int) -> TokenSample:
    """A sample cut after its last image token, with nothing to predict: enough to distill from."""
    found = without_targets(sample, _length_of_images(sample["input_ids"], image_token_id))
    return {**found, "num_samples": 1}


def num_images(sample: TokenSample) -> int:
    """How many images each of its conversations shows; those that stand apart have each their own copy."""
    num_apart = int((sample["position_ids"] == 0).sum())
    return len(sample.get("image_grid_thw", ())) // max(1, num_apart)


def without_targets(sample: TokenSample, max_length: int) -> TokenSample:
    """At most so many first tokens of a sample, with nothing to predict: enough for text to be kept as it was."""
    length = min(len(sample["input_ids"]), max_length)
    return {
        **sample,
        "input_ids": sample["input_ids"][:length],
        "targets": np.full(length, -100),
        "position_ids": sample["position_ids"][:length],
        "seen_until": sample["seen_until"][:length].clip(max=length - 1),
        "ends": np.array([length - 1]),
    }


def next_sequence(lengths: Sequence[int], sequence_length: int) -> list[int]:
    """Which of the waiting samples, whose `lengths` are given oldest first, the next sequence holds: the oldest, which
    fits, then again and again the longest that still fits. Their indices, in order."""
    sizes = np.asarray(lengths)
    chosen, room = [0], sequence_length - sizes[0]
    for index in 1 + np.argsort(-sizes[1:], kind="stable"):
        if sizes[index] <= room:
            chosen.append(int(index))
            room -= sizes[index]
    return sorted(chosen)


def collate_sequences(sequences: Sequence[PackedSequence], sequence_length: int, pad_token_id: int) -> Batch:
    """Packed sequences to one batch, its images together, if there are any. Padding is seen by itself alone."""
    every: list[Any] = [sample for samples in sequences for sample in samples]
    fill: dict[str, Any] = {"input_ids": pad_token_id, "targets": -100, "position_ids": 0}
    fill["seen_until"] = np.arange(sequence_length)
    batch = {name: np.full((len(sequences), sequence_length), value) for name, value in fill.items()}
    for number, samples in enumerate(sequences):
        texts: Any = [{name: v for name, v in one.items() if name not in IMAGE_INPUTS} for one in samples]
        packed: dict[str, Any] = dict(side_by_side(texts))  # the pixels are copied once, below
        for name, array in batch.items():
            array[number, : len(packed[name])] = packed[name]
    batch["num_samples"] = np.array(sum(one["num_samples"] for one in every))
    if seeing := [one for one in every if "pixel_values" in one]:
        batch |= {name: np.concatenate([one[name] for one in seeing]) for name in IMAGE_INPUTS}
    return cast(Batch, {name: torch.from_numpy(array) for name, array in batch.items()})


def images_in_branches(
    sequences: Sequence[PackedSequence], sequence_length: int, image_token_id: int, pad_token_id: int
) -> Batch | None:
    """Sequences that only distill as one row of tokens: what all samples begin with, once, then their images, the
    smallest first (`vora.distill.branches`). Each token computes what it does in `collate_sequences`.

    Returns:
        The batch with `branches`, and text alone beside it in `text_*`. None where something is to be predicted, or
        where a sample is more than that beginning and one image.
    """
    every = [sample for samples in sequences for sample in samples]
    seeing: Any = [sample for sample in every if "pixel_values" in sample]
    if not seeing or any((sample["targets"] != -100).any() for sample in every):
        return None
    beginning = seeing[0]["input_ids"][: int((seeing[0]["input_ids"] == image_token_id).argmax())]
    first = len(beginning)
    for sample in seeing:
        ids, grids = sample["input_ids"], sample["image_grid_thw"]
        has_one_image = len(grids) == 1 and grids[0, 0] == 1 and (ids[first:] == image_token_id).all()
        if not (has_one_image and np.array_equal(ids[:first], beginning)):
            return None
    seeing.sort(key=lambda sample: (len(sample["input_ids"]), *sample["image_grid_thw"][0]))
    lengths, counts = np.unique([len(sample["input_ids"]) - first for sample in seeing], return_counts=True)
    ids = np.concatenate([beginning, np.full(counts @ lengths, image_token_id)])[None]
    positions = [np.arange(first), *(sample["position_ids"][first:] for sample in seeing)]
    row: dict[str, Any] = {"input_ids": ids, "position_ids": np.concatenate(positions)[None]}
    row |= {"targets": np.full_like(ids, -100), "branches": np.stack([counts, lengths], 1)}
    row |= {name: np.concatenate([sample[name] for sample in seeing]) for name in IMAGE_INPUTS}
    row |= {"label_places": np.zeros(0, int), "image_places": np.arange(first, ids.shape[1])}
    row["num_samples"] = np.array(sum(sample["num_samples"] for sample in every))
    batch = cast(Batch, {name: torch.from_numpy(array) for name, array in row.items()})
    if text := [samples for samples in sequences if "pixel_values" not in samples[0]]:
        alone: Any = collate_sequences(text, sequence_length, pad_token_id)
        batch |= cast(Batch, {f"text_{name}": alone[name] for name in ("input_ids", "position_ids", "seen_until")})
        batch["text_places"] = places_of_text(text, sequence_length)["text_places"]
    return batch


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
    """label_places and, with images, image_places and image_numbers, see `VoraModel.forward`: found on the CPU before
    a step, so that it never waits for a GPU. ValueError if image tokens and images do not match."""
    found: Batch = {"label_places": (batch["targets"] != -100).flatten().nonzero()[:, 0]}
    if "image_grid_thw" in batch:
        is_image = batch["input_ids"] == image_token_id
        found["image_places"] = is_image.flatten().nonzero()[:, 0]
        found["image_numbers"] = image_blocks(is_image, batch["image_grid_thw"], patch_merge)
    return found


def places_of_text(sequences: Sequence[PackedSequence], sequence_length: int) -> Batch:
    """text_rows and text_places of the sequences of text alone, which is to be kept, if there are any."""
    text = [index for index, samples in enumerate(sequences) if "pixel_values" not in samples[0]]
    if not text:
        return {}
    lengths = [sum(len(sample["input_ids"]) for sample in sequences[index]) for index in text]
    found = [number * sequence_length + torch.arange(length) for number, length in enumerate(lengths)]
    return {"text_rows": torch.tensor(text), "text_places": torch.cat(found)}
