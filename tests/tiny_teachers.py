"""Tiny random ViTs of every family that can teach."""

import torch
from tiny import GRID, PATCH
from torch import nn
from transformers import AutoConfig, AutoModel

TINY = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=4, num_attention_heads=3, patch_size=PATCH)
SIZED = {**TINY, "image_size": PATCH * GRID, "initializer_range": 0.2}
# model_type: (configuration, tokens before the patches)
TEACHERS = {
    "vit": (SIZED, 1),
    "deit": (SIZED, 2),
    "clip_vision_model": (SIZED, 1),
    "siglip_vision_model": (SIZED, 0),
    "siglip2_vision_model": ({**TINY, "num_patches": GRID**2}, 0),
    "dinov2": (SIZED, 1),
    "dinov2_with_registers": ({**SIZED, "num_register_tokens": 3}, 4),
    "dinov3_vit": ({**SIZED, "num_register_tokens": 3}, 4),
    "aimv2_vision_model": (SIZED, 0),
}


def tiny_vit(kind: str, **changes: object) -> nn.Module:
    """A ViT of that family, with `changes` of its configuration."""
    shape = TEACHERS[kind][0] if kind in TEACHERS else SIZED
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**shape, **changes})
    return AutoModel.from_config(config, attn_implementation="eager").eval()
