"""Fixtures shared by the tests: tiny LLMs in memory, and one as a folder."""

import pytest
import tiny
import torch
from transformers import LlamaConfig, LlamaForCausalLM

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
