"""`vora inspect`, the figures: what each block makes of an image, beside its teacher, and where the answer looked.

Dims: I image tokens, D width of the LLM, D_t of the teacher.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from vora.distill.blocks import block_outputs
from vora.distill.blockwise import Pair, name_of
from vora.distill.objective import Objective
from vora.eval.inspect.attention_weights import attention_at, words_of_tokens
from vora.eval.inspect.colours import aligned, colours, principal_components
from vora.eval.metrics.cka import linear_cka
from vora.eval.scoring.prompt import check_context_length
from vora.model.processing_vora import VoraProcessor
from vora.report.images import image_of_patches

CURE = "lower --max-image-tokens or --max-new-tokens"


@dataclass
class Word:
    """A word of the answer and where the model looked when it chose its tokens, mean over them and over heads."""

    text: str
    attention: dict[int, torch.Tensor]  # {block: float[I]}, shares of all attention
    even_share: float  # what would fall on the image if attention were spread evenly over all that could be seen

    def map(self) -> torch.Tensor:
        """float[I]: the mean over blocks."""
        return torch.stack(list(self.attention.values())).mean(0)

    def share_by_block(self) -> dict[int, float]:
        """{block: share of its attention that falls on the image}."""
        return {block: float(weights.sum()) for block, weights in self.attention.items()}


@dataclass
class Inspection:
    """All that is shown of one image. Blocks count from 0; -1 is what enters the first one.

    Each likeness to the teacher stands also under its name with "_mirrored": that with what the teacher makes of the
    mirrored image, another one of the same kind, as a control.
    """

    image: Image.Image  # as the model sees it, cut to whole tokens
    grid: tuple[int, int]  # rows and columns of image tokens
    question: str
    answer: str
    colours: dict[int, torch.Tensor]  # {block: float[I, 3]} in 0..1
    variance: dict[int, list[float]]  # {block: [3 shares]} that these show of what differs between tokens
    words: list[Word]
    teacher: str | None = None
    pairs: list[Pair] = field(default_factory=list)
    teacher_colours: dict[int | str, torch.Tensor] = field(default_factory=dict)
    teacher_variance: dict[int | str, list[float]] = field(default_factory=dict)
    cka: dict[str, Any] = field(default_factory=dict)  # "blocks", "teacher_blocks", "cka": float[of these, of those]
    # per pair "student", "teacher", "cka"; with heads "cosine", what training maximises, and "centred_cosine", of what
    # is left when each side's mean over the image is taken off
    pair_likeness: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Every figure of the page, with lists for tensors and None for what is not a number."""
        words = []
        for word in self.words:
            shares = list(word.share_by_block().values())
            looked = {"share": fmean(shares), "even_share": word.even_share, "share_by_block": shares}
            words.append({"word": word.text, **looked, "map": word.map().view(self.grid)})
        similarity = {"teacher": self.teacher, **self.cka, "pairs": self.pair_likeness}
        return _plain(
            {
                "question": self.question,
                "answer": self.answer,
                "image_size": self.image.size,
                "grid": self.grid,
                "variance": [{"block": block, "shares": shares} for block, shares in self.variance.items()],
                "similarity": None if self.teacher is None else similarity,
                "attention": {"blocks": list(self.words[0].attention) if self.words else [], "words": words},
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
    """Look into a model while it looks at an image, and compare `pairs` of its blocks with those of its teacher.

    `answer` is to be followed; by default it is the model's own, greedy. ValueError where question and answer exceed
    the LLM's context.
    """
    objective.eval()
    vora, tokenizer = objective.vora, processor.tokenizer
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(vora.device)
    prompt = inputs["input_ids"]
    if answer is None:
        check_context_length(vora, prompt.shape[1] + max_new_tokens, CURE)
        ids = vora.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, prompt.shape[1] :].tolist()
    else:
        labels = processor.training_sample([*messages, {"role": "assistant", "content": answer}])["labels"]
        ids = labels[labels != -100].tolist()
        check_context_length(vora, prompt.shape[1] + len(ids), CURE)
    while ids and ids[-1] in tokenizer.all_special_ids:  # the end of the turn is no word
        ids.pop()
    inputs["input_ids"] = torch.cat([prompt, prompt.new_tensor([ids])], 1) if ids else prompt
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

    chosen_at = range(prompt.shape[1] - 1, prompt.shape[1] - 1 + len(ids))  # each token, at the place before it
    blocks = range(-1, len(vora.model.blocks))
    with attention_at(vora, chosen_at) as attention, block_outputs(vora.model.blocks, blocks) as outputs:
        vora.model(**inputs, use_cache=False)
    image_places = (prompt[0] == vora.config.image_token_id).nonzero()[:, 0].cpu()
    states = {block: outputs[block][0, image_places].float() for block in blocks}
    words = [
        Word(
            text,
            {block: weights[tokens][:, image_places].mean(0) for block, weights in sorted(attention.items())},
            fmean(len(image_places) / (chosen_at[token] + 1) for token in tokens),
        )
        for text, tokens in words_of_tokens(ids, tokenizer)
        if attention  # there is none where all blocks are linear
    ]
    shown, variance = _components(states)
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    _, patch_rows, patch_columns = images["image_grid_thw"][0].tolist()
    comparison = {}
    if objective.teacher is not None:
        mirrored = processor.image_processor(ImageOps.mirror(image), return_tensors="pt").to(vora.device)
        comparison = _comparison(objective, list(pairs), states, shown, {"": images, "_mirrored": mirrored})
    return Inspection(
        image=image_of_patches(
            images["pixel_values"].float().cpu().numpy(), patch_rows, patch_columns, processor.image_processor
        ),
        grid=(patch_rows // vora.config.patch_merge, patch_columns // vora.config.patch_merge),
        question=question,
        answer=tokenizer.decode(ids, skip_special_tokens=True).strip(),
        colours={block: colours(scores) for block, scores in shown.items()},
        variance=variance,
        words=words,
        **comparison,
    )


def _components(
    states: dict[Any, torch.Tensor], references: dict[Any, torch.Tensor] | None = None
) -> tuple[dict[Any, torch.Tensor], dict[Any, list[float]]]:
    """Principal components of each block, {block: float[I, 3]}, in the order and with the signs of the one before it,
    or of a reference's, and {block: [3 shares of the variance]}."""
    shown, variance, before = {}, {}, None
    for block, tokens in states.items():
        scores, variance[block] = principal_components(tokens.cpu())
        before = before if references is None else references[block]
        shown[block] = before = scores if before is None else aligned(scores, before)
    return shown, variance


def _comparison(
    objective: Objective,
    pairs: list[Pair],
    states: dict[int, torch.Tensor],
    shown: dict[int, torch.Tensor],
    inputs: dict[str, Any],
) -> dict[str, Any]:
    """What an `Inspection` says of the teacher. `states` are {block: float[I, D]}, `shown` their components, `inputs`
    those of the image under "" and of its mirror image under "_mirrored"."""
    blocks = sorted({*range(objective.teacher.num_blocks), *(teacher for _, teacher in pairs)})
    features = {
        mark: {block: tokens.float() for block, tokens in objective.teach(**images, blocks=blocks).items()}
        for mark, images in inputs.items()
    }
    paired = {teacher: shown[student] for student, teacher in pairs}
    components, variance = _components({block: features[""][block] for block in sorted(paired)}, paired)
    cka = {
        f"cka{mark}": linear_cka([one.cpu() for one in states.values()], [side[block].cpu() for block in blocks])
        for mark, side in features.items()
    }
    heads = objective.distillation and objective.distillation.to(objective.vora.device)
    likeness = []
    for student, teacher in pairs:
        place = list(states).index(student), blocks.index(teacher)
        one: dict[str, Any] = {"student": student, "teacher": teacher}
        one |= {name: values[place] for name, values in cka.items()}
        if heads is not None:
            said = heads.heads[name_of((student, teacher))](states[student]).float()
            for mark, side in features.items():
                target = heads.target((student, teacher), side[teacher])
                centred = said - said.mean(0), target - target.mean(0)
                one[f"cosine{mark}"] = float(F.cosine_similarity(said, target).mean())
                one[f"centred_cosine{mark}"] = float(F.cosine_similarity(*centred).mean())
        likeness.append(one)
    return {
        "teacher": objective.teacher.name,
        "pairs": pairs,
        "teacher_colours": {block: colours(scores) for block, scores in components.items()},
        "teacher_variance": variance,
        "cka": {"blocks": list(states), "teacher_blocks": blocks, **cka},
        "pair_likeness": likeness,
    }


def _plain(value: Any) -> Any:
    """Nested figures as JSON can hold them, rounded."""
    match value:
        case torch.Tensor():
            return _plain(value.tolist())
        case dict():
            return {key: _plain(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_plain(entry) for entry in value]
        case float():
            return round(value, 6) if math.isfinite(value) else None
    return value
