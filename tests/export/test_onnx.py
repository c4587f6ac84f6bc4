"""A model as ONNX graphs: the numbers of torch, for a prompt at once and for an answer behind the cache."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from command import vora
from exportable import save_exportable, tiny_exportable
from tiny import FAMILIES

from vora.export import verify as verifying
from vora.export.export_info import read_export_info, write_export_info
from vora.export.onnx_files import OnnxExport, write_onnx
from vora.export.onnx_runtime import Onnx
from vora.export.prompts import images_to_compare, make_prompt, squared

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_chat.py"
installed = all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not installed, reason="ONNX: pip install '.[onnx]'")


def compared(export, model, processor, size):
    images = [squared(processor, image, size) for image in images_to_compare([])]
    prompts = [make_prompt(processor, image, "what colour?") for image in images]
    return verifying.compare(model, processor, Onnx(export), prompts, 4)


@needs_onnx
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one != "llama")]
)
def test_graphs_compute_what_torch_does(family, tmp_path):
    """Gemma's blocks see windows, its embeddings are scaled and its logits capped; Phi's output layer has a bias."""
    model, processor = tiny_exportable(family)
    attention = model.config.get_text_config()._attn_implementation
    export = write_onnx(model, processor, tmp_path, 16)
    assert (export.image_size, export.num_image_tokens) == (16, 4)
    assert model.config.get_text_config()._attn_implementation == attention
    found = compared(export, model, processor, 16)
    assert found.failures == [] and found.image_attention == "bidirectional" and found.argmax_agreement == 1
    assert found.max_abs_diff < 1e-4 and found.num_tokens > 3 * 4  # answers too, token by token
    model.lm_head.weight.data[7] += 0.1  # another model is told
    assert any("Log-probabilities differ" in one for one in compared(export, model, processor, 16).failures)


@needs_onnx
def test_a_graph_that_torch_cannot_make_is_refused_in_a_line(tmp_path, monkeypatch, capsys):
    """torch's own error holds whole graphs, and its cause many lines."""
    model, processor = tiny_exportable("llama")
    attention = model.config.get_text_config()._attn_implementation

    def fails(*given, **options):
        raise RuntimeError("graph():\n" * 1000) from TypeError("\nno " + "x" * 1000 + "\nmore")

    monkeypatch.setattr("torch.onnx.export", fails)
    with pytest.raises(ValueError, match="makes no embed_tokens.onnx of this LLM: no x{197}. Export it --to gguf"):
        write_onnx(model, processor, tmp_path, 16)
    assert model.config.get_text_config()._attn_implementation == attention  # whoever has the model goes on with it
    assert capsys.readouterr().out == ""


@needs_onnx
def test_the_command_writes_what_answers_without_torch(tmp_path):
    save_exportable(tmp_path / "model")
    done = vora("export", "-m", tmp_path / "model", "--to", "onnx", "-o", tmp_path / "onnx")
    assert done.returncode == 0 and "24 x 24 pixels (9 tokens)" in done.stderr, done.stderr
    image = images_to_compare([])[1]
    image.save(tmp_path / "image.png")
    command = [sys.executable, EXAMPLE, tmp_path / "onnx", tmp_path / "image.png", "what colour?"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = ["--min-image-tokens", 9, "--max-image-tokens", 9, "--max-new-tokens", 64]
    chat = vora("chat", tmp_path / "image.png", "-m", tmp_path / "model", "-q", "what colour?", *options)
    assert said.strip() and said.strip() in chat.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx", "--quant", "q8_0"], "are of --to gguf"),
        (["--to", "mlx"], "--to mlx is unknown: give gguf or onnx."),
    ],
)
def test_what_onnx_has_not_is_refused(options, message, tmp_path):
    done = vora("export", "-m", "anything", "-o", tmp_path / "out", *options)
    assert done.returncode == 1 and message in done.stderr


def test_without_what_writes_it_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("vora.export.onnx_files.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"ONNX is not installed \(onnx, onnxscript, onnxruntime\): .*vora-vlm\[onnx\]"
    ):
        verifying.verify(tmp_path, "onnx")


def test_graphs_that_are_written_want_only_what_runs_them(monkeypatch, tmp_path):
    """Not what writes them, with which an export began; nor files of llama.cpp."""
    export = OnnxExport(tmp_path, 24, 9, 4, [2], "QUESTION", "<image>", None)
    write_export_info(export, tmp_path)
    assert read_export_info(tmp_path, OnnxExport) == export
    with pytest.raises(ValueError, match="--to gguf`: export.json there is of something else"):
        verifying.verify(tmp_path, "llama.cpp", files=tmp_path)
    monkeypatch.setattr("vora.export.onnx_files.find_spec", lambda name: name == "onnxruntime" or None)
    with pytest.raises(ValueError, match=f"{tmp_path} holds no"):  # the model, which is looked for after that
        verifying.verify(tmp_path, "onnx", files=tmp_path)
    monkeypatch.setattr("vora.export.onnx_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"ONNX is not installed \(onnxruntime\)"):
        verifying.verify(tmp_path, "onnx", files=tmp_path)
