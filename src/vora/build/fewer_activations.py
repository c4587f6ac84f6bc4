"""Norms and gated MLPs of a frozen LLM that keep less for the backward pass, and compute the same.

A norm keeps its input in the input's precision, not what it made of it in float32; an MLP keeps gate and up, and makes
the activation and the product again from them.

Dims: T tokens (any leading dims), D LLM width, I width inside the MLP.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

# {activation: (it, its gradient from that of its output and its input)}
ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    SiLUActivation: (F.silu, torch.ops.aten.silu_backward),
    nn.SiLU: (F.silu, torch.ops.aten.silu_backward),
    GELUTanh: (partial(F.gelu, approximate="tanh"), partial(torch.ops.aten.gelu_backward, approximate="tanh")),
}


class RMSNorm(torch.autograd.Function):
    """weight * x / root of the mean of x^2, of x float[T, D] and a frozen weight float[D]; x / root is in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, scale, weight)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        normed, gradient = x * scale, (gradients[0] * weight).float()
        along = torch.linalg.vecdot(gradient, normed).unsqueeze(-1) / x.shape[-1]
        return torch.addcmul(gradient, normed, along, value=-1).mul_(scale).to(x.dtype), None, None


class GatedProduct(torch.autograd.Function):
    """act(gate) * up, of float[T, I] each."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: type[nn.Module]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act, ctx.gradient_of_act = ACTIVATIONS[activation]
        return ctx.act(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        (gradient,) = gradients
        return ctx.gradient_of_act(gradient * up, gate), ctx.act(gate).mul_(gradient), None


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    if module.weight.requires_grad:
        return type(module).forward(module, hidden_states)
    return RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)


def _gated_mlp(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(GatedProduct.apply(module.gate_proj(x), module.up_proj(x), type(module.act_fn)))


def keep_fewer_activations(model: nn.Module) -> None:
    """Have the RMSNorms and gated MLPs of a model, where they are written as Llama's are, keep less."""
    for module in model.modules():
        if _is_written_as(module, LlamaRMSNorm):
            module.forward = partial(_norm, module)
        elif _is_written_as(module, LlamaMLP) and type(module.act_fn) in ACTIVATIONS:
            module.forward = partial(_gated_mlp, module)


def keep_all_activations(model: nn.Module) -> None:
    """Undo `keep_fewer_activations`."""
    for module in model.modules():
        replaced = vars(module).get("forward")
        if isinstance(replaced, partial) and replaced.func in (_norm, _gated_mlp):
            del module.forward


def _is_written_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module's forward is that of a class, line by line: most families of transformers repeat Llama's."""
    code, other = type(module).forward.__code__, known.forward.__code__
    parts = "co_code", "co_names", "co_consts", "co_varnames"
    return "forward" not in vars(module) and all(getattr(code, part) == getattr(other, part) for part in parts)
