"""Compiled blocks train what plain ones do, are compiled once, and leave no trace in what is saved."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from runs import close_to, losses, run
from safetensors.torch import load_file
from tiny import PATCH, SHAPE, prompt, text, tiny_vora, train_a_little
from tiny_teachers import tiny_vit
from torch._dynamo.utils import counters

from vora import Teacher, VoraImageProcessor, attach_vision_lora
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.train.blocks import compile_blocks
from vora.train.recipe import load_recipe


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def objective():
    """LoRA in two of three blocks, and a teacher of two; LoRA does something."""
    student = attach_vision_lora(tiny_vora("llama"), rank=2, num_blocks=2)
    train_a_little(student)
    distillation = BlockwiseDistillation(block_pairs(2, 2), SHAPE["hidden_size"], 24)
    teacher = Teacher(tiny_vit("vit", num_hidden_layers=2))
    return Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation).train()


def batch_of(length, seed, predicts=True):
    inputs = prompt([*text(3, seed), (2, 3, seed), (3, 3, seed + 1), *text(length - 18, seed + 2)])
    inputs["targets"] = torch.nn.functional.pad(inputs["input_ids"][:, 1:], (0, 1), value=-100)
    inputs["targets"][:, : 17 if predicts else length] = -100
    return inputs


STEPS = [(22, True), (22, False), (25, True), (29, True), (31, False), (23, True)]
NUM_KINDS = 3  # of blocks: with LoRA, without, the teacher's


@pytest.mark.parametrize(
    ("backend", "recomputed", "bf16"),
    [
        ("eager", 2, False),
        pytest.param("aot_eager", 0, False, marks=pytest.mark.slow),
        pytest.param("inductor", 2, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_learn_the_same_and_are_compiled_once(objective, backend, recomputed, bf16):
    if recomputed:
        objective.gradient_checkpointing_enable(num_blocks=recomputed)

    def step(number):
        objective.zero_grad()
        objective.distillation.num_updates.zero_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            length, predicts = STEPS[number]
            loss = objective(**batch_of(length, number, predicts))["loss"]
        loss.backward()
        return loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}

    plain, names = [step(number) for number in range(len(STEPS))], list(objective.state_dict())
    compile_blocks(objective, SimpleNamespace(torch_compile_backend=backend, torch_compile_mode=None))
    num_graphs = []
    for number, (loss, gradients) in enumerate(plain):
        found, same = step(number)
        num_graphs.append(counters["stats"]["unique_graphs"])
        assert found == pytest.approx(loss, rel=1e-2 if bf16 else 1e-5)
        assert gradients.keys() == same.keys()
        for name, gradient in gradients.items():
            error = (same[name] - gradient).norm() / gradient.norm().clamp_min(1e-9)
            assert error < (0.1 if bf16 else 1e-4), name
    assert num_graphs[0] <= NUM_KINDS + 1  # the teacher's is made again for a second grid, and then for all
    assert num_graphs[1] == num_graphs[0]  # images alone
    assert num_graphs[2] <= num_graphs[1] + 2 and num_graphs[3:] == [num_graphs[2]] * 3  # any length after the second
    assert not counters["graph_break"]
    assert list(objective.state_dict()) == names


def test_a_compiled_run_answers_saves_and_resumes_as_a_plain_one(recipe, data_file, tmp_path):
    def wanted(**training):
        made = recipe(max_steps=4, save_steps=2, **training)
        image = data_file.replace("train.jsonl", "red.png")
        return load_recipe(made.model_dump() | {"sample_generations": [{"image": image, "question": "what colour?"}]})

    run(wanted(), tmp_path / "plain")
    expected = close_to(losses(tmp_path / "plain"), abs=1e-4)
    trainer = run(wanted(torch_compile_backend="eager", torch_compile=True), tmp_path / "compiled")
    assert trainer.model_wrapped is trainer.model  # not compiled again as a whole
    num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs <= NUM_KINDS + 1 and not counters["graph_break"]  # growing answers compile nothing
    assert losses(tmp_path / "compiled") == expected
    plain, compiled = (load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "compiled" / name)
    run(load_recipe(tmp_path / "compiled" / "recipe.yaml"), tmp_path / "compiled", resume=True)
    assert losses(tmp_path / "compiled") == expected
