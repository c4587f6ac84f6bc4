"""Fixtures shared by the tests: tiny LLMs in memory, and one as a folder."""

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llm_folder(tmp_path_factory):
    """A tiny Llama with its tokenizer, saved as on the hub."""
    folder = tmp_path_factory.mktemp("llm")
    tokenizer = tiny.tiny_tokenizer()
    shape = {**tiny.SHAPE, "vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A tiny ViT of two blocks, saved as on the hub."""
    folder = tmp_path_factory.mktemp("teacher")
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    torch.manual_seed(1)
    ViTModel(ViTConfig(**shape, image_size=16, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    return str(folder)
