"""LLaVA's way is transformers' LLaVA in the form of a VoRA student; the blind LLM sees only the words."""

import copy

import pytest
import torch
from tiny import GRID, IMAGE, PATCH, generate, logits_of, picture, prompt, text, tiny_llm
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from vora import Teacher, attach_vision_lora, merge_vision_lora
from vora.adapt.llava import VoraLlavaForConditionalGeneration
from vora.distill.teacher import images_of_patches

SIDE = PATCH * GRID
SHAPE = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 3,
    "patch_size": PATCH, "image_size": SIDE, "initializer_range": 0.2,
}  # fmt: skip
MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
TOWERS = ("vit", "clip_vision_model", "siglip_vision_model")


def tiny_tower(kind="vit"):
    torch.manual_seed(0)
    vit = AutoModel.from_config(AutoConfig.for_model(kind, **SHAPE))
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Teacher(vit, MEAN, STD)


def tiny_llava(kind="vit", family="llama", patch_merge=1):
    torch.manual_seed(1)
    return VoraLlavaForConditionalGeneration.from_llm(
        tiny_llm(family), encoder=tiny_tower(kind), patch_merge=patch_merge, image_token_id=IMAGE
    )


@pytest.mark.parametrize("kind", TOWERS)
def test_it_is_transformers_llava(kind):
    model = tiny_llava(kind)
    inputs = prompt([*text(3), (GRID, GRID, 0), *text(4, 1)])
    pixels = images_of_patches(inputs["pixel_values"], [(GRID, GRID)], PATCH, MEAN, STD)[0][None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    own = logits_of(model, **inputs)
    words = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    theirs = logits_of(model.to_llava(), **words, pixel_values=(pixels - mean) / std)
    torch.testing.assert_close(own, theirs, atol=1e-5, rtol=0)
    other = logits_of(model, **inputs | {"pixel_values": picture(GRID, GRID, 1)})
    assert (own - other).abs().max() > 0.05
