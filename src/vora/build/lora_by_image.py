"""Vision LoRA left unmerged: on in conversations with an image, off in others, whose answers stay the LLM's own.

A conversation is a row of the batch. Whether it has an image is decided where it is read, and kept with its cache, so
that all tokens generated after it are computed alike. Rows of both kinds go through one batch: PEFT adds LoRA to those
whose adapter is not called `__base__`.
"""

import functools
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from inspect import signature
from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import Cache

from vora.model.modeling_vora import CACHE, VoraForConditionalGeneration, VoraModel

BASE = "__base__"  # what PEFT calls no adapter
KEPT = "rows_with_image"  # attribute of a cache, list[bool] of its rows
FORWARD = signature(VoraModel.forward)

_rows_with_image: ContextVar[list[bool] | None] = ContextVar("rows_with_image", default=None)  # of the pass at work


class LoraByRow:
    """A LoRA layer of PEFT, of whatever kind, that is on in rows with an image."""

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = _rows_with_image.get()
        if rows is None or all(rows):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not any(rows):
            return self.base_layer(x, *args, **kwargs)
        (name,) = self.active_adapters
        names = [name if has_image else BASE for has_image in rows]
        return super().forward(x, *args, adapter_names=names, **kwargs)  # type: ignore[misc]


class OrderedWithRows:
    """A cache, of whatever class, in which what was decided of its rows goes where they go."""

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        setattr(self, KEPT, [getattr(self, KEPT)[row] for row in beam_idx.tolist()])

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        setattr(self, KEPT, [getattr(self, KEPT)[row] for row in indices.tolist()])

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        setattr(self, KEPT, [row for row in getattr(self, KEPT) for _ in range(repeats)])


@functools.cache
def _ordered(kind: type[Cache]) -> type[Cache]:
    return type(kind.__name__, (OrderedWithRows, kind), {})


@functools.cache
def _by_row(kind: type[LoraLayer]) -> type[LoraLayer]:
    return type(kind.__name__, (LoraByRow, kind), {})


def use_lora_by_image(peft_model: PeftModel) -> VoraForConditionalGeneration:
    """The model under PEFT, whose LoRA from now on is added to conversations with an image alone, in the precision of
    its LLM. Images are those that come as `pixel_values`; a packed sequence counts as one conversation.

    A cache that another model filled, or whose conversation gets its first image only now, makes its `forward` raise a
    ValueError: what it holds was computed otherwise.
    """
    model = peft_model.get_base_model()
    dtype = model.lm_head.weight.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(False).data = parameter.data.to(dtype)
    model.hooks_of_lora = [  # which end when it is merged
        model.model.register_forward_pre_hook(_look_for_images, with_kwargs=True),
        model.model.register_forward_hook(_keep_with_cache, always_call=True),
    ]
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.__class__ = _by_row(type(layer))  # type: ignore[arg-type]
    model._hf_peft_config_loaded = True  # transformers then saves the adapter alone, as PEFT does
    model._can_compile_fullgraph = False  # `generate` would compile, past what is decided here
    return model.eval()


def _look_for_images(model: VoraModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = FORWARD.bind(model, *args, **kwargs).arguments
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    batch = embeds if ids is None else ids
    if batch is None:
        return  # what `forward` refuses
    rows = [False] * len(batch)
    if given.get("image_grid_thw") is not None:
        rows = model.image_token_mask(ids, embeds).any(1).tolist()
    cache = given.get("past_key_values") if given.get("cache") is None else given["cache"]
    if cache is not None and cache.get_seq_length() > 0:
        rows = _continued(cache, rows)
    for module in model.modules() if model.training else ():
        if getattr(module, "gradient_checkpointing", False):
            recompute = getattr(module, "_gradient_checkpointing_func")
            if getattr(recompute, "func", None) is not _checkpointed:
                setattr(module, "_gradient_checkpointing_func", functools.partial(_checkpointed, recompute))
    _rows_with_image.set(rows)


def _checkpointed(checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A block that is computed again in the backward pass, with the rows that have an image now: by then this pass is
    over."""
    return checkpoint(functools.partial(copy_context().run, block), *args, **kwargs)


def _continued(cache: Cache, rows: list[bool]) -> list[bool]:
    """What was decided of the conversations in a cache, of which `rows` say whether they get an image now."""
    kept = getattr(cache, KEPT, [])
    if len(set(kept)) == 1:  # alike, however many are left of them, or beams go on from them
        kept = kept[:1] * len(rows)
    if len(kept) != len(rows):
        raise ValueError(
            f"The cache is of {len(kept)} conversations that this model has read, with or without LoRA, and "
            f"{len(rows)} are to go on: begin anew, without a cache."
        )
    if num_late := sum(new and not had for new, had in zip(rows, kept)):
        raise ValueError(
            f"{num_late} of {len(rows)} conversations get their first image after text that was read without LoRA: "
            "begin anew with all of the conversation, without a cache."
        )
    return kept


def _keep_with_cache(model: VoraModel, args: tuple[Any, ...], outputs: Any) -> None:
    cache = getattr(outputs, CACHE, None)
    if cache is not None:
        setattr(cache, KEPT, _rows_with_image.get())
        if not isinstance(cache, OrderedWithRows):
            cache.__class__ = _ordered(type(cache))  # type: ignore[arg-type]
    _rows_with_image.set(None)
