"""Small models to plan for, wide enough that linear layers matter."""

from pathlib import Path

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTModel

from vora.train.recipe import Recipe, load_recipe

SIDE = 6  # patches of an image's side
NUM_TEXT = 40


def small_models(tmp_path: Path, family: str = "llama", **changes: object) -> None:
    """An LLM and a ViT as folders."""
    shape = tiny.SHAPE | {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 400} | tiny.FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **shape | changes)
    AutoModelForCausalLM.from_config(config, attn_implementation="eager").save_pretrained(tmp_path / "llm")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "llm")
    vit = ViTConfig(hidden_size=48, intermediate_size=96, num_attention_heads=3, num_hidden_layers=2, image_size=48,
                    patch_size=8)  # fmt: skip
    ViTModel(vit, add_pooling_layer=False).save_pretrained(tmp_path / "vit")


def recipe_of(tmp_path: Path, **sections: object) -> Recipe:
    """Of a run that trains them on data that is not here."""
    values = {
        "model": {"llm": str(tmp_path / "llm"), "attn_implementation": "eager"},
        "teacher": {"name": str(tmp_path / "vit")},
        "lora": {"rank": 8, "num_blocks": 2},
        "data": {"sources": [{"path": "nowhere.jsonl"}], "sequence_length": 2 * SIDE**2 + NUM_TEXT},
        "training": {"max_steps": 10},
    }
    return load_recipe(values | sections)
