"""Where an LLM comes from: a folder with a GGUF file, and what its generation config becomes."""

import gguf
import numpy as np
import pytest
import torch
from tiny import IMAGE, prompt, text, tiny_vora
from transformers import AutoModelForCausalLM, AutoTokenizer

from vora import VoraForConditionalGeneration, VoraProcessor

WIDTH, HEADS, INNER, BLOCKS = 32, 4, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<reponame>", *"abcdefghijklmnopqrstuvwxyzĠĊ", "ab"]


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory):
    """A tiny random Llama in one GGUF file, with nothing beside it."""
    folder = tmp_path_factory.mktemp("gguf")
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * 4 + [1] * (len(TOKENS) - 4))  # control tokens, then ordinary ones
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
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
    model = VoraForConditionalGeneration.from_llm(str(gguf_folder), patch_size=4, image_size=8)
    processor = VoraProcessor.from_llm(str(gguf_folder), patch_size=4, image_size=8)
    assert model.config.image_token_id == TOKENS.index("<reponame>") == processor.image_token_id
    ids = torch.tensor([[4, 9, 14, 7]])
    with torch.no_grad():
        expected = llm(ids).logits
        assert torch.equal(model(input_ids=ids).logits, expected)
        model.to_llm().save_pretrained(tmp_path)  # as an ordinary folder: nothing of the quantization is left
        AutoTokenizer.from_pretrained(gguf_folder, gguf_file="tiny.gguf").save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


def test_a_folder_with_two_gguf_files_is_refused(gguf_folder, tmp_path):
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / name).write_bytes((gguf_folder / "tiny.gguf").read_bytes())
    with pytest.raises(ValueError, match="2 GGUF files"):
        VoraForConditionalGeneration.from_llm(str(tmp_path))


def test_the_image_token_is_never_generated_and_the_llm_alone_is_free_of_that(monkeypatch):
    vora = tiny_vora("llama")
    plain = vora.logits

    def fond_of_images(states):
        logits = plain(states)
        logits[..., IMAGE] += 100
        return logits

    monkeypatch.setattr(vora, "logits", fond_of_images)
    answer = vora.generate(**prompt([*text(3), (2, 2, 0), *text(2, 1)]), max_new_tokens=4, do_sample=False)
    assert IMAGE not in answer[0, -4:].tolist()
    assert vora.to_llm().generation_config.suppress_tokens is None


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_asked_for_is_the_attention_used(llm_folder, attention):
    model = VoraForConditionalGeneration.from_llm(llm_folder, attn_implementation=attention)
    assert model.config._attn_implementation == attention
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {attention}


def test_saved_configurations_name_no_folder_of_this_machine(llm_folder, tmp_path):
    VoraForConditionalGeneration.from_llm(llm_folder).save_pretrained(tmp_path)
    assert llm_folder not in (tmp_path / "config.json").read_text()
