"""Tiny random models of LLM families that llama.cpp knows, in shapes that it takes, with a tokenizer."""

import torch
from tiny import FAMILIES, SHAPE, tiny_tokenizer
from tiny_teachers import tiny_vit
from transformers import AutoConfig, AutoModelForCausalLM

from vora.build.from_llm import from_llm, processor_from_llm

# llama.cpp writes down which blocks slide (five of six) or have no rotary positions (each fourth)
GEMMA3 = {"num_hidden_layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "sliding_window": 16}
SHAPES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma3_text": GEMMA3,
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
}
TOKEN = 8  # side of an image token in pixels


def tiny_exportable(family="llama", teacher="vit", image_markers=None, **options):
    """(model, processor) whose patch embedding starts as a ViT's: 4 to 9 image tokens of 2 x 2 patches of 4 pixels."""
    tokenizer, vit = tiny_tokenizer(), tiny_vit(teacher, image_size=24)
    shape = SHAPE | FAMILIES[family] | SHAPES.get(family, {}) | {"vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
    for name, parameter in llm.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    letters = [token.replace("\u0120", " ").isascii() for token in tokens]
    llm.get_output_embeddings().weight.data *= torch.tensor(letters)[:, None]  # halves of letters are not generated
    model = from_llm(llm.eval(), teacher=vit, patch_merge=2, tokenizer=tokenizer, **options)
    model.model.patch_embedding.position.data.normal_()
    processor = processor_from_llm(
        tokenizer,
        teacher=vit,
        patch_merge=2,
        image_markers=image_markers,
        image_mean=(0.5, 0.4, 0.3),
        image_std=(0.5, 0.3, 0.2),
    )
    return model, processor


def save_exportable(folder, *args, **kwargs):
    """Such a model with its processor as a folder."""
    model, processor = tiny_exportable(*args, **kwargs)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
