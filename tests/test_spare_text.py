"""Trained LoRA turned away from text: by the least squares that it claims, and no further."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import logits_of, prompt, text, tiny_vora

from vora import attach_vision_lora
from vora.adapt.spare_text import InputMoments, spare_text
from vora.distill.keep_text import lora_off
from vora.train.recipe import load_recipe
from vora.train.run import train

PICTURES = [prompt([*text(4, seed), (3, 4, seed), *text(6, seed + 50)]) for seed in range(12)]
TEXTS = [prompt(text(30, seed)) for seed in range(100, 112)]


def trained(family):
    model = attach_vision_lora(tiny_vora(family), rank=4).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def moments(model, batches):
    found = InputMoments(model)
    with torch.no_grad():
        for inputs in batches:
            with found.counted(inputs["attention_mask"].bool()):
                model(**inputs)
    return found


def both(model):
    with lora_off(model):
        read = moments(model, TEXTS)
    return moments(model, PICTURES), read


def cost(layer, a, before, seen, read, strength):
    b = layer.lora_B["default"].weight.double()
    changed, left = b @ (a - before), b @ a
    return ((changed @ seen) * changed).sum() + strength * ((left @ read) * left).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_what_is_found_is_the_least(family):
    model = trained(family)
    seen, read = both(model)
    before = {name: layer.lora_A["default"].weight.double() for name, layer in seen.layers.items()}
    shares = spare_text(seen, read, strength=2.0)
    assert shares["text_after"] < 0.8 * shares["text_before"] and 0 < shares["seen_lost"] < 1
    torch.manual_seed(1)
    for name, layer in seen.layers.items():
        found, of = layer.lora_A["default"].weight.double(), (seen.mean(name), read.mean(name), 2.0)
        least = cost(layer, found, before[name], *of)
        for step in (0.1, -0.1):
            other = found + step * found.norm() * torch.nn.functional.normalize(torch.randn_like(found), dim=None)
            assert cost(layer, other, before[name], *of) > least, name
        assert cost(layer, before[name], before[name], *of) > least, name


def test_text_comes_back_and_pictures_less_so():
    model = trained("llama")
    with torch.no_grad(), lora_off(model):
        own = [logits_of(model, **inputs) for inputs in TEXTS]
    apart = []
    for strength in (0.0, 1.0, 1e6):
        spare_text(*both(model), strength)
        with torch.no_grad():
            apart.append(
                sum(torch.dist(logits_of(model, **inputs), wanted).item() for inputs, wanted in zip(TEXTS, own))
            )
    assert apart[0] > 1.2 * apart[1] > 12 * apart[2]


def test_no_strength_changes_nothing():
    model = trained("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    shares = spare_text(*both(model), strength=0)
    assert shares["seen_lost"] < 1e-8 and shares["text_before"] == pytest.approx(shares["text_after"])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], atol=1e-5, rtol=1e-4)


def test_padding_does_not_count():
    model = trained("llama")
    alone, padded = (prompt(*rows) for rows in ([text(9)], [text(9), text(20, 1)]))
    padded["input_ids"][padded["attention_mask"] == 0] = 9  # a word: of the padding token nothing but zeros would come
    one, two = moments(model, [alone, prompt(text(20, 1))]), moments(model, [padded])
    assert one.num_tokens == two.num_tokens == one.total_weight == 29
    for name in one.layers:
        torch.testing.assert_close(one.mean(name), two.mean(name), atol=1e-4, rtol=1e-4)


def test_tokens_count_by_their_weights():
    model = trained("llama")
    both, first = prompt(text(9), text(9, 1)), prompt(text(9))
    weights = torch.tensor([[3.0], [1.0]]).expand(2, 9)
    weighted, one, other = InputMoments(model), moments(model, [first]), moments(model, [prompt(text(9, 1))])
    with torch.no_grad(), weighted.counted(weights):
        model(**both)
    for name in one.layers:
        wanted = 0.75 * one.mean(name) + 0.25 * other.mean(name)
        torch.testing.assert_close(weighted.mean(name), wanted, atol=1e-4, rtol=1e-4)


def test_moments_are_not_rounded_to_bf16_under_autocast():
    model = trained("llama")
    found, entered = InputMoments(model), {}
    for name, layer in found.layers.items():
        layer.register_forward_pre_hook(lambda _, inputs, name=name: entered.update({name: inputs[0][0].double()}))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), found.counted(torch.ones(1, 30)):
        model(**TEXTS[0])
    for name in found.layers:
        wanted = entered[name].T @ entered[name] / 30
        torch.testing.assert_close(found.mean(name), wanted, atol=1e-5 * wanted.max().item(), rtol=1e-5)


def test_layers_of_one_input_share_its_moments():
    found = moments(trained("llama"), TEXTS[:1])
    owners = {name.rsplit(".")[-1]: owner.rsplit(".")[-1] for name, owner in found.shared.items()}
    assert owners["k_proj"] == owners["v_proj"] == "q_proj" and owners["up_proj"] == "gate_proj"
    assert owners["o_proj"] == "o_proj" and owners["down_proj"] == "down_proj"


def test_what_cannot_be_is_refused():
    model = trained("llama")
    seen, read = both(model)
    with pytest.raises(ValueError, match="strength is -1"):
        spare_text(seen, read, strength=-1)
    with pytest.raises(ValueError, match="0 of text were counted"):
        spare_text(seen, InputMoments(model))


def test_the_script_spares_a_run(llm_folder, teacher_folder, tmp_path):
    for name in ("red", "blue"):
        Image.new("RGB", (16, 16), name).save(tmp_path / f"{name}.png")
    rows = [{"image": f"{name}.png", "question": "which?", "answer": name} for name in ("red", "blue")]
    (tmp_path / "seen.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["which colour is it", "the red one is blue", "what is which"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in words))
    recipe = load_recipe(
        {
            "model": {"llm": llm_folder},
            "teacher": {"name": teacher_folder, "image_only_steps": 1},
            "lora": {"rank": 4, "keep_text": 1.0},
            "data": {
                "sources": [{"path": str(tmp_path / "seen.jsonl")}, {"path": str(tmp_path / "text.jsonl")}],
                "row_tokens": 128,
            },
            "training": {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "warmup_steps": 1},
        }
    )
    train(recipe, tmp_path / "run")
    script = [sys.executable, Path(__file__).parents[1] / "examples" / "spare_text.py", tmp_path / "run"]
    options = ["--tokens", "200", "--out", tmp_path / "spared"]
    told = subprocess.run(
        [*script, tmp_path / "run" / "recipe.yaml", "data.row_tokens=120", *options], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr
    shares = dict(line.split(": ") for line in told.stdout.splitlines())
    assert int(shares["tokens with pictures"]) >= 200 and int(shares["tokens of text"]) > 0
    assert 0 < float(shares["text_after"]) < float(shares["text_before"])
    before = load_file(tmp_path / "run" / "final" / "adapter_model.safetensors")
    after = load_file(tmp_path / "spared" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert changed and all("lora_A" in name for name in changed)
