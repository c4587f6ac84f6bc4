"""Where an LLM comes from: a folder with a GGUF file, and what its generation config becomes."""

import copy
import shutil

import gguf
import numpy as np
import pytest
import tiny
import torch
from messages import coloured, encode, user
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTMAEConfig, ViTMAEModel

from vora import VoraForConditionalGeneration, VoraProcessor
from vora.build import hub
from vora.build.base_llm import _as_the_mean_token, choose_image_token, resolve_llm
from vora.build.fetch import wheel_files
from vora.build.vit_init import vit_embedding

WIDTH, HEADS, INNER, BLOCKS = 32, 4, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>", *"abcdefghijklmnopqrstuvwxyzĠĊ", "ab"]


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    """A tiny random Llama in one GGUF file, with nothing beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    fields = {
        "block_count": BLOCKS, "context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "head_count": HEADS, "head_count_kv": HEADS, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 10000.0,
        "rope_dimension_count": WIDTH // HEADS, "vocab_size": len(TOKENS), "tokenizer_model": "gpt2",
        "token_list": TOKENS, "token_types": [3] * 4 + [1] * (len(TOKENS) - 4),  # control tokens, then ordinary ones
        "token_merges": ["a b"], "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), WIDTH), "output_norm": (WIDTH,)}
    for block in range(BLOCKS):
        shapes |= {f"blk.{block}.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{block}.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{block}.{name}": (INNER, WIDTH) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{block}.ffn_down": (WIDTH, INNER)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.3, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_a_folder_with_a_gguf_file_is_an_llm(gguf_folder, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(gguf_folder, gguf_file="tiny.gguf")
    make = (VoraForConditionalGeneration.from_llm, VoraProcessor.from_llm)
    model, processor = (one(str(gguf_folder), patch_size=4, image_size=8) for one in make)
    assert model.config.image_token_id == TOKENS.index("<reponame>") == processor.image_token_id
    ids = torch.tensor([[4, 9, 14, 7]])
    with torch.no_grad():
        expected = llm(ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        model.to_llm().save_pretrained(tmp_path)  # as an ordinary folder: nothing of the quantization is left
        AutoTokenizer.from_pretrained(gguf_folder, gguf_file="tiny.gguf").save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_what_is_an_llm_and_what_is_not_there(gguf_folder, tmp_path, monkeypatch):
    for name in ("one.gguf", "two.gguf"):
        shutil.copy(gguf_folder / "tiny.gguf", tmp_path / name)
    assert resolve_llm(str(tmp_path / "one.gguf")) == (str(tmp_path), {"gguf_file": "one.gguf"})
    monkeypatch.setattr(hub, "hub_problem", lambda name: None)
    assert resolve_llm("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", {})
    with pytest.raises(ValueError, match="2 GGUF files"):
        resolve_llm(str(tmp_path))
    for name in (str(tmp_path / "none"), "./none", str(tmp_path / "none.gguf"), "a/b/c"):
        with pytest.raises(ValueError, match="The LLM .*(none|gguf|a/b/c): there is no .*never looked for on the hub"):
            resolve_llm(name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_used_and_no_folder_is_saved(llm_folder, attention, tmp_path):
    model = VoraForConditionalGeneration.from_llm(llm_folder, attn_implementation=attention)
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {attention}
    model.save_pretrained(tmp_path)
    assert llm_folder not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_a_vocabulary_that_grew_says_no_image(family):
    """The new row is the mean of the others, so that the LLM alone, which knows of no suppressed token, never says it
    and loses nothing; a random one's logit would be near 0, though all others be far below."""
    llm = tiny.tiny_llm(family)
    size = llm.config.vocab_size
    llm.get_output_embeddings().weight.data += 0.5
    before = [table.weight.detach().clone() for table in (llm.get_input_embeddings(), llm.get_output_embeddings())]
    llm.resize_token_embeddings(size + 1, mean_resizing=False)
    _as_the_mean_token(llm, size)
    for table, old in zip((llm.get_input_embeddings(), llm.get_output_embeddings()), before):
        torch.testing.assert_close(table.weight, torch.cat([old, old.mean(0)[None]]))
    logits = llm(torch.arange(3, 20)[None]).logits[0]
    assert (logits[:, size] < logits[:, :size].max(-1).values).all()
    torch.testing.assert_close(logits[:, size], logits[:, :size].mean(-1), atol=1e-4, rtol=1e-4)


def test_a_token_that_pads_or_ends_stands_for_no_image():
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|padding|>", "<|extra_0|>"]})
    usual = choose_image_token(copy.deepcopy(tokenizer))[0]
    tokenizer.pad_token = usual
    chosen, number = choose_image_token(tokenizer)
    assert chosen != usual and number != tokenizer.pad_token_id


def test_a_loaded_llm_is_not_loaded_otherwise():
    with pytest.raises(ValueError, match="loaded already, so dtype would change nothing"):
        VoraForConditionalGeneration.from_llm(tiny.tiny_llm("llama"), dtype=torch.bfloat16)


def test_quantized_weights_are_refused_before_they_are_trained(llm_folder, monkeypatch):
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    llm.is_quantized = True
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *args, **kwargs: llm)
    with pytest.raises(ValueError, match="are quantized.*name the LLM that it was quantized from"):
        VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=8)


def test_an_environment_without_pip_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setenv("VORA_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConnectionError, match="fetched by pip, which .* lacks: run `python -m ensurepip` or `uv pip"):
        wheel_files("easy-vqa==1.0")


def test_a_resized_vocabulary_needs_its_tokenizer(llm_folder):
    """Then model and processor choose one image token; without it they would choose two."""
    llm, tokenizer = AutoModelForCausalLM.from_pretrained(llm_folder), tiny.tiny_tokenizer()
    tokenizer.add_tokens(["<new>", "<image>"])
    llm.resize_token_embeddings(len(tokenizer))
    with pytest.raises(ValueError, match="its vocabulary was resized.* tokenizer=TOKENIZER"):
        VoraForConditionalGeneration.from_llm(llm, patch_size=4, image_size=8)
    bare = VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=8)
    model = VoraForConditionalGeneration.from_llm(llm, tokenizer=tokenizer, patch_size=4, image_size=8)
    processor = VoraProcessor.from_llm(tokenizer, patch_size=4, image_size=8)
    inputs = encode(processor, [user(coloured("red"))])
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="0 image tokens .* made with another tokenizer than the model"):
        bare(**inputs)
    assert model.config.image_token_id == processor.image_token_id < model.config.text_config.vocab_size


def test_a_vit_that_hides_patches_from_itself_is_refused():
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    with pytest.raises(ValueError, match="ViTMAEModel hides 75% of the patches.* only plain ViTs"):
        vit_embedding(ViTMAEModel(ViTMAEConfig(**shape, image_size=16, patch_size=8)))
