"""A linear layer with LoRA in as few operations as it takes: nothing is scaled, added or copied by itself."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from vora.model.segmented_sdpa import computing_dtype


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T of x float[T, in], frozen W float[out, in], A float[r, in] and B float[out, r], all
    of one dtype. What is added is added inside a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        low = x @ a.T
        ctx.save_for_backward(x, low, weight, a, b)
        y = F.linear(x, weight, bias)
        return torch.addmm(y, low, b.T, out=y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_low, of_x = gradient @ b, None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            of_x = torch.addmm(of_x, of_low, a, out=of_x)
        return of_x, None, None, of_low.T @ x, gradient.T @ low


class LoraLinear(Linear):
    """PEFT's layer, whose forward is one `LoraProduct` wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._plain_adapter()
        if name is None or args or kwargs or x.dim() < 2 or not self._in_one_dtype(x, name):
            return super().forward(x, *args, **kwargs)
        base, dtype = self.get_base_layer(), computing_dtype(x)
        # Conv1D of GPT-2 keeps its weight transposed
        weight = (base.weight.T if self.fan_in_fan_out else base.weight).to(dtype)
        b = self.lora_B[name].weight
        b = b if self.scaling[name] == 1 else b * self.scaling[name]
        bias = None if base.bias is None else base.bias.to(dtype)
        a, b = self.lora_A[name].weight.to(dtype), b.to(dtype)
        y = LoraProduct.apply(x.to(dtype).flatten(0, -2), weight, bias, a, b)
        return y.view(*x.shape[:-1], y.shape[-1])

    def _plain_adapter(self) -> str | None:
        """The only active adapter, if it is LoRA and nothing else on a frozen plain layer."""
        base, names = self.get_base_layer(), self.active_adapters
        if self.disable_adapters or self.merged or len(names) != 1 or type(base) not in (nn.Linear, Conv1D):
            return None
        (name,) = names
        if name not in self.lora_A or self.use_dora.get(name) or not isinstance(self.lora_dropout[name], nn.Identity):
            return None
        parts = base, self.lora_A[name], self.lora_B[name]
        is_hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
        is_frozen = not any(parameter.requires_grad for parameter in base.parameters())
        return name if is_frozen and not is_hooked and self.lora_B[name].bias is None else None

    def _in_one_dtype(self, x: Tensor, name: str) -> bool:
        """Whether autocast computes in one dtype, or all are of one."""
        weight, a, dtype = self.get_base_layer().weight, self.lora_A[name].weight, computing_dtype(x)
        return {x.dtype, weight.dtype, a.dtype} == {dtype} or computing_dtype(a) != a.dtype


def use_lora_product(model: nn.Module) -> None:
    """Have the LoRA layers of a model compute by `LoraProduct`; those of another kind, such as 4-bit ones, stay."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and type(layer) is Linear:
            layer.__class__ = LoraLinear
