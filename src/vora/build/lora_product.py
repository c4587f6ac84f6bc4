"""A linear layer with LoRA in as few operations as it takes: nothing is scaled, added or copied by itself."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn

from vora.model.segmented_sdpa import computing_dtype


class LoraProduct(torch.autograd.Function):
    """x W^T + bias + (x A^T) B^T of x float[..., in], frozen W float[out, in], A float[r, in] and B float[out, r], all
    of one dtype. What is added is added inside a product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        low = rows @ a.T
        ctx.save_for_backward(x, low, weight, a, b)
        y = F.linear(rows, weight, bias)
        return torch.addmm(y, low, b.T, out=y).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, low, weight, a, b = ctx.saved_tensors
        gradient = gradients[0].flatten(0, -2)
        of_low = gradient @ b
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ weight
            of_x = torch.addmm(of_x, of_low, a, out=of_x).view_as(x)
        return of_x, None, None, of_low.T @ x.flatten(0, -2), gradient.T @ low


class LoraLinear(Linear):
    """PEFT's layer, whose forward is one `LoraProduct` wherever that computes the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        weight, adapters = self.get_base_layer().weight, self.active_adapters
        plain = not (self.disable_adapters or self.merged or args or kwargs or weight.requires_grad)
        if not plain or len(adapters) != 1 or adapters[0] not in self.lora_A:
            return super().forward(x, *args, **kwargs)
        (name,), dtype = adapters, computing_dtype(x)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        in_one = {x.dtype, weight.dtype, a.dtype} == {dtype} or computing_dtype(a) != a.dtype
        if not in_one or self.use_dora.get(name) or not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x, *args, **kwargs)
        weight = weight.T if self.fan_in_fan_out else weight  # Conv1D of GPT-2 keeps its weight transposed
        if (scale := self.scaling[name]) != 1:
            b = b * scale
        bias = getattr(self.get_base_layer(), "bias", None)
        bias = None if bias is None else bias.to(dtype)
        return LoraProduct.apply(x.to(dtype), weight.to(dtype), bias, a.to(dtype), b.to(dtype))


def use_lora_product(model: nn.Module) -> None:
    """Have the LoRA layers of a model compute by `LoraProduct`; those of another kind, such as 4-bit ones, stay."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and type(layer) is Linear:
            layer.__class__ = LoraLinear
