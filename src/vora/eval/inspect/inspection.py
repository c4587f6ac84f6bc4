"""`vora inspect`, the figures: what each block makes of an image, beside its teacher, and where the answer looked.

Dims: I image tokens, T tokens of the sequence, R places, C channels, p patch side.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase

from vora.distill.blocks import hook_on_output
from vora.distill.blockwise import Pair, name_of
from vora.distill.objective import Objective
from vora.eval.inspect.attention_weights import attention_at, words_of_tokens
from vora.eval.inspect.colours import aligned, colours, principal_components
from vora.eval.metrics.cka import linear_cka
from vora.model.modeling_vora import VoraForConditionalGeneration
from vora.model.processing_vora import VoraProcessor
from vora.report.images import image_of_patches


@dataclass
class Word:
    """A word of the answer and where the model looked when it chose its tokens, mean over them and over heads.

    Args:
        attention: {block: float[I]}, shares of all attention.
        even_share: what would fall on the image if attention were spread evenly over all that could be seen.
    """

    text: str
    attention: dict[int, torch.Tensor]
    even_share: float

    def map(self) -> torch.Tensor:
        """float[I]: the mean over blocks."""
        return torch.stack(list(self.attention.values())).mean(0)

    def share_by_block(self) -> dict[int, float]:
        """{block: share of its attention that falls on the image}."""
        return {block: float(weights.sum()) for block, weights in self.attention.items()}


@dataclass
class Inspection:
    """All that is shown of one image. Blocks count from 0; -1 is what enters the first one.

    Args:
        image: as the model sees it, cut to whole tokens.
        grid: (rows, columns) of image tokens.
        colours, teacher_colours: {block: float[I, 3]} in 0..1.
        variance, teacher_variance: {block: [3 shares]} that those colours show of what differs between tokens.
        pairs: (student block, teacher block) side by side.
        cka: {"blocks", "teacher_blocks": lists, "cka", "cka_mirrored": float[blocks, teacher blocks]}. The image
            that the teacher is given is mirrored: the control, for that is another image of the same kind.
        pair_likeness: one dict per pair: "student", "teacher", "cka"; with heads "cosine" (what training maximises)
            and "centred_cosine" (of what is left when each side's mean over the image is taken off); and each with
            "_mirrored".
    """

    image: Image.Image
    grid: tuple[int, int]
    question: str
    answer: str
    colours: dict[int, torch.Tensor]
    variance: dict[int, list[float]]
    words: list[Word]
    teacher: str | None = None
    pairs: list[Pair] = field(default_factory=list)
    teacher_colours: dict[int | str, torch.Tensor] = field(default_factory=dict)
    teacher_variance: dict[int | str, list[float]] = field(default_factory=dict)
    cka: dict[str, Any] = field(default_factory=dict)
    pair_likeness: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Every figure of the page, with lists for tensors and None for what is not a number."""
        rows, columns = self.grid
        similarity = None
        if self.teacher is not None:
            similarity = {"teacher": self.teacher, **self.cka, "pairs": self.pair_likeness}
        words = [
            {
                "word": word.text,
                "share": sum(word.share_by_block().values()) / len(word.attention),
                "even_share": word.even_share,
                "share_by_block": list(word.share_by_block().values()),
                "map": word.map().view(rows, columns),
            }
            for word in self.words
        ]
        blocks = list(self.words[0].attention) if self.words else []
        return _plain(
            {
                "question": self.question,
                "answer": self.answer,
                "image_size": list(self.image.size),
                "grid": [rows, columns],
                "variance": [{"block": block, "shares": shares} for block, shares in self.variance.items()],
                "similarity": similarity,
                "attention": {"blocks": blocks, "words": words},
            }
        )


@torch.no_grad()
def inspect_image(
    objective: Objective,
    processor: VoraProcessor,
    image: Image.Image,
    question: str,
    answer: str | None = None,
    pairs: Sequence[Pair] = (),
    max_new_tokens: int = 64,
) -> Inspection:
    """Look into a model while it looks at an image.

    Args:
        objective: around the model; its teacher and heads, if it has them, are compared with.
        image: RGB.
        answer: to follow; by default the model's own, greedy.
        pairs: (student block, teacher block) to compare one by one with a teacher, see `take_teacher`.
        max_new_tokens: of the model's own answer.

    Raises:
        ValueError: question and answer exceed the LLM's context.
    """
    objective.eval()
    vora = objective.vora
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(vora.device)
    prompt = inputs["input_ids"]
    if answer is None:
        _check_length(vora, prompt.shape[1], max_new_tokens)
        ids = vora.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    else:
        labels = processor.training_sample([*messages, {"role": "assistant", "content": answer}])["labels"]
        ids = labels[labels != -100].tolist()
        _check_length(vora, prompt.shape[1], len(ids))
    while ids and ids[-1] in processor.tokenizer.all_special_ids:  # the end of the turn is no word
        ids.pop()
    inputs["input_ids"] = torch.cat([prompt, prompt.new_tensor([ids])], 1) if ids else prompt
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    image_places = (prompt[0] == vora.config.image_token_id).nonzero()[:, 0]

    first = prompt.shape[1] - 1  # from where the answer's first token is chosen
    chosen_at = [first + index for index in range(len(ids))]
    blocks = range(-1, len(vora.model.blocks))
    with attention_at(vora, chosen_at) as attention, states_at(vora, blocks, image_places) as states:
        vora.model(**inputs, use_cache=False)

    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    _, patch_rows, patch_columns = images["image_grid_thw"][0].tolist()
    merge = vora.config.patch_merge
    shown, variance = _coloured(states)
    found = Inspection(
        image=image_of_patches(
            images["pixel_values"].float().cpu().numpy(), patch_rows, patch_columns, processor.image_processor
        ),
        grid=(patch_rows // merge, patch_columns // merge),
        question=question,
        answer=processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
        colours={block: colours(scores) for block, scores in shown.items()},
        variance=variance,
        words=_words(ids, processor.tokenizer, attention, chosen_at, image_places.cpu()),
    )
    if objective.teacher is not None:
        mirrored = processor.image_processor(ImageOps.mirror(image), return_tensors="pt").to(vora.device)
        _compare(found, objective, states, shown, images, mirrored, list(pairs))
    return found


@contextmanager
def states_at(
    model: VoraForConditionalGeneration, blocks: Sequence[int], places: torch.Tensor
) -> Iterator[dict[int, torch.Tensor]]:
    """Collect blocks' outputs at some places while a model runs on one sequence: yields {block: float[R, D]}."""
    states: dict[int, torch.Tensor] = {}

    def keep(block: int, hidden: torch.Tensor) -> None:
        states[block] = hidden[0, places].float()

    hooks = [hook_on_output(model.model.blocks, block, partial(keep, block)) for block in blocks]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _check_length(vora: VoraForConditionalGeneration, length: int, more: int) -> None:
    limit = getattr(vora.config.get_text_config(), "max_position_embeddings", None)
    if limit and length + more > limit:
        raise ValueError(
            f"Image and question have {length} tokens and the answer may take {more} more, but the LLM's context "
            f"holds {limit}: lower --max-image-tokens or --max-new-tokens."
        )


def _coloured(
    states: dict[Any, torch.Tensor], references: dict[Any, torch.Tensor] | None = None
) -> tuple[dict[Any, torch.Tensor], dict[Any, list[float]]]:
    """Principal components of each block, in the order and with the signs of the one before it, or of a reference's.

    Returns:
        ({block: float[I, 3]}, {block: [3 shares of the variance]}).
    """
    shown: dict[Any, torch.Tensor] = {}
    variance: dict[Any, list[float]] = {}
    before: torch.Tensor | None = None
    for block, tokens in states.items():
        scores, variance[block] = principal_components(tokens.cpu())
        before = before if references is None else references[block]
        shown[block] = before = scores if before is None else aligned(scores, before)
    return shown, variance


def _words(
    ids: list[int],
    tokenizer: PreTrainedTokenizerBase,
    attention: dict[int, torch.Tensor],
    chosen_at: list[int],
    image_places: torch.Tensor,
) -> list[Word]:
    if not attention:  # no block attends: all are linear
        return []
    words = []
    for text, tokens in words_of_tokens(ids, tokenizer):
        maps = {block: weights[tokens][:, image_places].mean(0) for block, weights in sorted(attention.items())}
        even = sum(len(image_places) / (chosen_at[token] + 1) for token in tokens) / len(tokens)
        words.append(Word(text, maps, even))
    return words


def _compare(
    found: Inspection,
    objective: Objective,
    states: dict[int, torch.Tensor],
    shown: dict[int, torch.Tensor],
    images: dict[str, torch.Tensor],
    mirrored: dict[str, torch.Tensor],
    pairs: list[Pair],
) -> None:
    """Fill in what concerns the teacher.

    Args:
        states: {student block: float[I, D]}.
        shown: {student block: float[I, 3]}, its components.
        mirrored: the same image, left and right exchanged, as image inputs.
    """
    teacher_model, heads = objective.teacher, objective.distillation
    assert teacher_model is not None
    teacher_model.to(objective.vora.device)
    blocks = sorted({*range(teacher_model.num_blocks), *(teacher for _, teacher in pairs)})
    features, mirrored_features = (
        {block: tokens.float() for block, tokens in objective.teach(**inputs, blocks=blocks).items()}
        for inputs in (images, mirrored)
    )
    paired = {teacher: shown[student] for student, teacher in pairs}
    components, found.teacher_variance = _coloured({block: features[block] for block in sorted(paired)}, paired)
    found.teacher_colours = {block: colours(scores) for block, scores in components.items()}
    found.teacher, found.pairs = teacher_model.name, pairs
    values, control = (
        linear_cka([states[block].cpu() for block in states], [others[block].cpu() for block in blocks])
        for others in (features, mirrored_features)
    )
    found.cka = {"blocks": list(states), "teacher_blocks": blocks, "cka": values, "cka_mirrored": control}
    rows, columns = list(states), blocks
    for student, teacher in pairs:
        place = rows.index(student), columns.index(teacher)
        found.pair_likeness.append(
            {"student": student, "teacher": teacher, "cka": values[place], "cka_mirrored": control[place]}
        )
    if heads is not None:
        heads = heads.to(objective.vora.device)
        for likeness, pair in zip(found.pair_likeness, pairs):
            said = heads.heads[name_of(pair)](states[pair[0]]).float()
            for mark, others in (("", features), ("_mirrored", mirrored_features)):
                target = heads.target(pair, others[pair[1]])
                likeness[f"cosine{mark}"] = _cosine(said, target)
                likeness[f"centred_cosine{mark}"] = _cosine(said - said.mean(0), target - target.mean(0))


def _cosine(said: torch.Tensor, target: torch.Tensor) -> float:
    return float(F.cosine_similarity(said, target, dim=-1).mean())


def _plain(value: Any) -> Any:
    """Nested figures as JSON can hold them, rounded."""
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
