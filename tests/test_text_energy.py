"""What LoRA does to text, from second moments: the same as from the texts themselves, and drawn down by a run."""

import json
from itertools import islice

import pytest
import torch
from tiny import prompt, text, tiny_vora

from vora import VoraForConditionalGeneration, attach_vision_lora
from vora.adapt.spare_text import InputMoments
from vora.data.sources import load_source
from vora.data.stream import PackedRows
from vora.distill.keep_text import lora_off
from vora.distill.learner import VisionLearner
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import load_recipe
from vora.train.run import train
from vora.train.text_energy import TextEnergy, moments_of_text

TEXTS = [prompt(text(30, seed)) for seed in range(6)]


def trained(family):
    model = attach_vision_lora(tiny_vora(family), rank=4, lora_alpha=8).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return model


def measured(model):
    """(InputMoments of TEXTS, {layer: what entered it})."""
    read, entered = InputMoments(model), {}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: entered.setdefault(layer, []).append(inputs[0][0]))
        for layer in read.layers.values()
    ]
    with torch.no_grad(), lora_off(model):
        for inputs in TEXTS:
            with read.counted(inputs["attention_mask"].bool()):
                model(**inputs)
    for hook in hooks:
        hook.remove()
    return read, {layer: torch.cat(inputs) for layer, inputs in entered.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_share_and_gradients_are_those_of_the_texts_themselves(family):
    model = trained(family)
    read, entered = measured(model)
    shares = []
    for layer, inputs in entered.items():
        base = layer.get_base_layer()
        with torch.no_grad():
            own = base(inputs) - (0 if base.bias is None else base.bias)
        added = 2 * layer.lora_B["default"](layer.lora_A["default"](inputs))
        shares.append(added.square().sum() / own.square().sum())
    pairs = [p for name, p in model.named_parameters() if "lora_" in name]
    wanted = torch.autograd.grad(3.0 * torch.stack(shares).sum(), pairs)
    for pair in pairs:
        pair.grad = torch.ones_like(pair)
    energy = TextEnergy(read)
    share = energy.share()
    energy.pull(3.0)
    assert share == pytest.approx(float(torch.stack(shares).mean()), rel=1e-3) and share > 0
    for pair, gradient in zip(pairs, wanted):
        torch.testing.assert_close(pair.grad, 1 + gradient, atol=1e-4, rtol=1e-3)


def test_every_process_reads_the_same_texts(sources, llm_folder):
    loaded, found = [load_source(path) for path in sources], []
    for rank in range(2):
        torch.manual_seed(0)
        model = VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
        processor = VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
        rows = PackedRows(loaded, processor, 64, keep_text=True, rank=rank, num_ranks=2)
        learner = VisionLearner(attach_vision_lora(model, rank=4), processor.image_processor)
        found.append(moments_of_text(learner, rows, num_tokens=200))
    assert found[0].num_tokens == found[1].num_tokens >= 200
    for owner, total in found[0].sums.items():
        assert torch.equal(total, found[1].sums[owner])


def test_texts_are_sought_where_there_are_some(sources, llm_folder, monkeypatch):
    processor = VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    rows = PackedRows([load_source(path) for path in sources], processor, 64, keep_text=True, weights=[99, 1])
    drawn, draw = [], rows.maker.draw
    monkeypatch.setattr(rows.maker, "draw", lambda source, *rest: drawn.append(source) or draw(source, *rest))
    found = list(islice(rows.texts(), 100))
    assert len(found) == 100 and not any("pixel_values" in sample for sample in found)
    assert drawn.count(0) <= 16


def recipe(sources, llm_folder, teacher_folder, **lora):
    return load_recipe(
        {
            "model": {"llm": llm_folder},
            "teacher": {"name": teacher_folder},
            "lora": {"rank": 4, "keep_text": 1.0, **lora},
            "data": {"sources": [{"path": path, "weight": 1} for path in sources], "row_tokens": 64},
            "training": {
                "max_steps": 12,
                "logging_steps": 4,
                "per_device_train_batch_size": 2,
                "learning_rate": 3e-3,
                "use_cpu": True,
                "warmup_steps": 1,
            },
        }
    )


def test_a_run_acts_on_text_the_less_the_more_it_is_to_spare_it(sources, llm_folder, teacher_folder, tmp_path):
    energies = {}
    for weight in (1e-9, 10.0):
        out = tmp_path / str(weight)
        train(recipe(sources, llm_folder, teacher_folder, spare_text=weight), out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        energies[weight] = [line["text_energy"] for line in lines if "text_energy" in line]
        assert len(energies[weight]) == 3
    assert 0 < energies[10.0][-1] < 0.5 * energies[1e-9][-1]


def test_without_texts_nothing_can_be_spared(sources, llm_folder, teacher_folder, tmp_path):
    with pytest.raises(ValueError, match="held 0 texts without pictures"):
        train(recipe(sources[:1], llm_folder, teacher_folder, spare_text=1.0), tmp_path / "run")


def test_pairs_without_gradients_are_not_pulled():
    model = trained("llama")
    read, _ = measured(model)
    pairs = {name: p for name, p in model.named_parameters() if "lora_" in name}
    before = {name: p.detach().clone() for name, p in pairs.items()}
    for name, pair in pairs.items():
        pair.grad = torch.zeros_like(pair) if "layers.0" in name else None
    TextEnergy(read).pull(1.0)
    for name, pair in pairs.items():
        assert torch.equal(pair, before[name])
        assert (pair.grad is not None and pair.grad.any()) if "layers.0" in name else pair.grad is None
