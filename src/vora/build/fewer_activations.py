"""Norms and gated MLPs of a frozen LLM that keep less for the backward pass, and compute the same.

A norm keeps its input in the input's precision, not what it made of it in float32; an MLP keeps gate and up, and makes
the activation and the product again from them.

Dims: T tokens (any leading dims), D LLM width, I width inside the MLP.
"""

from collections.abc import Callable
from functools import cache, partial
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


class Lean:
    """A module whose class is made (`_lean`), and which is pickled by what that is made of."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        how, kind = type(self).__bases__
        return _bare, (kind, how), vars(self)


class LeanNorm(Lean):
    """An RMSNorm, of whatever class, that keeps its input alone; one that trains is as ever."""

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if self.weight.requires_grad:
            return super().forward(hidden_states)  # type: ignore[misc]
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(Lean):
    """A gated MLP, of whatever class, that keeps gate and up alone."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(GatedProduct.apply(self.gate_proj(x), self.up_proj(x), type(self.act_fn)))


@cache
def _lean(kind: type[nn.Module], how: type) -> type[nn.Module]:
    return type(kind.__name__, (how, kind), {})


def _bare(kind: type[nn.Module], how: type) -> nn.Module:
    made = _lean(kind, how)  # type: ignore[arg-type]
    return made.__new__(made)


def keep_fewer_activations(model: nn.Module) -> None:
    """Have the RMSNorms and gated MLPs of a model, where they are written as Llama's are, keep less."""
    for module in model.modules():
        if _is_written_as(module, LlamaRMSNorm):
            module.__class__ = _lean(type(module), LeanNorm)  # type: ignore[arg-type]
        elif _is_written_as(module, LlamaMLP) and type(module.act_fn) in ACTIVATIONS:
            module.__class__ = _lean(type(module), LeanMLP)  # type: ignore[arg-type]


def keep_all_activations(model: nn.Module) -> None:
    """Undo `keep_fewer_activations`."""
    for module in model.modules():
        if isinstance(module, Lean):
            module.__class__ = type(module).__bases__[1]


def _is_written_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether a module's forward is that of a class, line by line: most families of transformers repeat Llama's."""
    code, other = type(module).forward.__code__, known.forward.__code__
    parts = "co_code", "co_names", "co_consts", "co_varnames"
    return "forward" not in vars(module) and all(getattr(code, part) == getattr(other, part) for part in parts)
