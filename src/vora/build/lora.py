"""Vision LoRA: on (PEFT) and off (merged in fp32)."""

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from vora.build.fewer_activations import keep_all_activations, keep_fewer_activations
from vora.build.lora_product import use_lora_product
from vora.model.modeling_vora import VoraForConditionalGeneration

PATCH_EMBEDDING = "patch_embedding"
ALL_OF_PATCH_EMBEDDING = rf".*\b{PATCH_EMBEDDING}\..*"


def peft_model_of(model: VoraForConditionalGeneration, config: PeftConfig) -> PeftModel:
    """`get_peft_model` without the warning that it asks transformers by an old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


def attach_vision_lora(
    model: VoraForConditionalGeneration, *, rank: int = 32, num_blocks: int | None = None,
    target_modules: Sequence[str] | None = None, lora_alpha: int | None = None,
) -> PeftModel:  # fmt: skip
    """Freeze the LLM and give its first blocks trainable low-rank pairs; the patch embedding alone trains with them.

    Args:
        num_blocks: how many blocks from the bottom; all by default. A teacher's depth in the paper.
        target_modules: names of linear layers inside a block; by default all of them (q, k, v, o, gate, up, down).
        lora_alpha: scale times rank; rank by default, so that the scale is 1 (the paper has no alpha).

    Raises:
        ValueError: a target name matches no layer, or the LLM has fewer blocks than asked for.
    """
    blocks = model.model.blocks
    num_blocks = len(blocks) if num_blocks is None else num_blocks
    if not 1 <= num_blocks <= len(blocks):
        raise ValueError(
            f"num_blocks is {num_blocks}, but the LLM has {len(blocks)} blocks: choose 1 to {len(blocks)} "
            "(with a deeper teacher, let its blocks be spread over the LLM's)."
        )
    layers = sorted({name.rsplit(".")[-1] for name, m in blocks.named_modules() if isinstance(m, (nn.Linear, Conv1D))})
    target_modules = layers if target_modules is None else list(target_modules)
    if unknown := sorted(set(target_modules) - set(layers)):
        raise ValueError(f"LoRA targets {unknown} match no linear layer of a block: choose among {', '.join(layers)}.")
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if lora_alpha is None else lora_alpha,
        lora_dropout=0.0,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in blocks.modules()),
        target_modules=target_modules,
        layers_to_transform=list(range(num_blocks)),
        layers_pattern=next(name for name, m in model.named_modules() if m is blocks).rsplit(".")[-1],
        modules_to_save=[getattr(model, "trained_vision", PATCH_EMBEDDING)],
        exclude_modules=ALL_OF_PATCH_EMBEDDING if hasattr(model, "trained_vision") else None,
    )
    peft_model = peft_model_of(model, config)
    use_lora_product(peft_model)
    keep_fewer_activations(peft_model)
    return peft_model


def keep_trained_in_fp32(model: nn.Module) -> None:
    """What trains is kept in float32: updates of 1e-4 vanish in bf16."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@torch.no_grad()
def merge_vision_lora(model: PeftModel | VoraForConditionalGeneration) -> VoraForConditionalGeneration:
    """Fold every pair into its weight, W + scale * B A, computed in fp32 and cast once at the end.

    Args:
        model: from `attach_vision_lora`, or opened by transformers from a folder with an adapter; it is used up.

    Raises:
        TypeError: there is no vision LoRA on the model.
        ValueError: a merged weight is not finite; no weight has been changed then.
    """
    if not (isinstance(model, PeftModel) or getattr(model, "_hf_peft_config_loaded", False)):
        raise TypeError(f"{type(model).__name__} carries no vision LoRA: nothing to merge.")
    merged = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        weight = layer.get_base_layer().weight
        total = weight.float()
        for adapter in layer.active_adapters:
            pair = layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
            # Conv1D of GPT-2 keeps its weight transposed
            total = total + layer.scaling[adapter] * (pair.T if getattr(layer, "fan_in_fan_out", False) else pair)
        total = total.to(weight.dtype)
        if not torch.isfinite(total).all():
            num_bad = int((~torch.isfinite(total)).sum())
            raise ValueError(
                f"{num_bad} of {total.numel()} merged weights of {name} are not finite in {weight.dtype}: the "
                "training diverged. Merge an earlier checkpoint, or train again with a lower learning rate."
            )
        merged[layer] = total
    for layer, weight in merged.items():
        layer.get_base_layer().weight.copy_(weight)
    model = model.unload() if isinstance(model, PeftModel) else _without_adapter(model)
    keep_all_activations(model)
    model.model.patch_embedding.to(model.lm_head.weight.dtype)  # trained in fp32; saved models have one precision
    return model


def _without_adapter(model: VoraForConditionalGeneration) -> VoraForConditionalGeneration:
    """A model without the adapter that `from_pretrained` put into it, which PEFT itself cannot take off."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, layer.get_base_layer())
        elif isinstance(layer, ModulesToSaveWrapper):
            model.set_submodule(name, layer.modules_to_save[layer.active_adapter])
    for hook in model.__dict__.pop("hooks_of_lora", ()):
        hook.remove()
    del model.peft_config
    model._hf_peft_config_loaded = False
    model.__dict__.pop("_weight_conversions", None)  # they would put the adapter's prefixes into saved names
    return model
