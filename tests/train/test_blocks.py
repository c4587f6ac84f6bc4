"""Compiled blocks train what plain ones do and leave no trace; no step waits for its device, but to log."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from packed import Waits, objective_of, questions
from runs import close_to, losses, run
from safetensors.torch import load_file
from tiny import IMAGE, PATCH, SHAPE, prompt, text, tiny_vora, train_a_little
from tiny_teachers import TEACHERS, tiny_vit
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from vora import Teacher, VoraImageProcessor, attach_vision_lora
from vora.data.packing import collate_sequences, cut_after_images, label_weights, places, share_prefixes
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.model.patch_embed import put_tokens
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import SampleGenerationSection
from vora.train.run import compile_blocks
from vora.train.trainer import ON_HOST


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def objective(fresh_compiler):
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
        objective.distillation.has_moments = False
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


@pytest.mark.slow
def test_a_compiled_run_answers_saves_and_resumes_as_a_plain_one(fresh_compiler, recipe, data_file, tmp_path):
    plain = recipe(max_steps=4, save_steps=2)
    image = data_file.replace("train.jsonl", "red.png")
    plain.sample_generations = [SampleGenerationSection(image=image, question="what colour?")]
    compiled = plain.model_copy(deep=True)
    compiled.training |= {"torch_compile_backend": "eager", "torch_compile": True}
    run(plain, tmp_path / "plain")
    expected = close_to(losses(tmp_path / "plain"), abs=1e-4)
    trainer = run(compiled, tmp_path / "compiled")
    assert trainer.model_wrapped is trainer.model  # not compiled again as a whole
    num_graphs = counters["stats"]["unique_graphs"]
    assert 0 < num_graphs < 8 * NUM_KINDS  # cut in two by attention, for two lengths; growing answers compile nothing
    assert all("segmented_sdpa" in reason for reason in counters["graph_break"])
    assert losses(tmp_path / "compiled") == expected
    plain, compiled = (load_file(tmp_path / n / "final" / "adapter_model.safetensors") for n in ("plain", "compiled"))
    assert plain.keys() == compiled.keys()
    for name in ("final", "checkpoint-4"):
        shutil.rmtree(tmp_path / "compiled" / name)
    run(load_recipe(tmp_path / "compiled" / "recipe.yaml"), tmp_path / "compiled", resume=True)
    assert losses(tmp_path / "compiled") == expected


class Sent(TorchDispatchMode):
    """Counts what goes from the host to the device while the host waits, and what comes back. Without a GPU the device
    is torch's `meta`: tensors on it have no values, so that whoever reads one fails."""

    # their gradients read sizes, which shows on a GPU alone
    HIDDEN = ("aten::masked_scatter_backward", "aten::masked_select", "aten::masked_select_backward")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result, name = function(*args, **kwargs), function.name().rpartition(".")[0] or function.name()
        places = {value.device.type for value in (*args, result) if isinstance(value, torch.Tensor)}
        copies = name in ("aten::_to_copy", "aten::copy_") and len(places) > 1 and not kwargs.get("non_blocking")
        if copies or name in self.HIDDEN:
            self.found.append(name)
        return result


def device_batch(distill_only=False):
    """A batch as the trainer hands it on, on the device but for what only the host reads."""
    samples = [share_prefixes(questions(0)), share_prefixes(questions(1, 1))]
    if distill_only:
        samples = [cut_after_images(one, IMAGE) for one in samples]
    batch = collate_sequences([[one] for one in samples], 64, pad_token_id=0)
    batch |= places(batch, IMAGE) | {"label_weights": label_weights(batch, 1.0)}
    return {name: value if name in ON_HOST else value.to("meta") for name, value in batch.items()}


FAMILIES = ("llama", "gemma3_text", "gpt_neox")
HOW = ("recomputed", "in parts", "images alone", "bf16", "all targets")


@pytest.mark.parametrize(
    ("kind", "family", "how"),
    [
        *((kind, "llama", "as it is") for kind in TEACHERS),
        *(("vit", family, how) for family in FAMILIES for how in HOW),
    ],
)
def test_neither_teacher_nor_student_is_waited_for(kind, family, how, monkeypatch):
    pairs = [(0, 0), (2, 1), (2, SUMMARY)] if how == "all targets" else block_pairs(3, 2)
    distillation = BlockwiseDistillation(pairs, SHAPE["hidden_size"], 24, standardize=how == "all targets")
    teacher, student = Teacher(tiny_vit(kind)), attach_vision_lora(objective_of(family).vora, rank=2)
    objective = Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation).train().to("meta")
    if how == "recomputed":
        objective.gradient_checkpointing_enable(num_blocks=2)
    if how == "in parts":
        monkeypatch.setattr("vora.distill.label_loss.MOST_LOGITS", 2 * SHAPE["vocab_size"])
    assert teacher.device.type == "cpu"
    batch = device_batch(how == "images alone")
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    for step in range(2):  # the first step brings the teacher, and numbers that stay
        with Sent() as sent:
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "bf16"):
                losses = objective(**batch)
            losses["loss"].backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
    assert teacher.device.type == "meta" and "distill_loss" in losses
    assert ("lm_loss" in losses) == (how != "images alone")
    assert sent.found == []


def test_reads_and_copies_are_seen():
    values = torch.zeros(3, device="meta")
    for read in (lambda: values.sum().item(), lambda: values.nonzero(), lambda: bool(values.any())):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read()
    with Sent() as sent:
        torch.zeros(3).to("meta")
        values.requires_grad_().masked_scatter(torch.zeros(3, device="meta") > 1, values).sum().backward()
    assert sent.found == ["aten::_to_copy", "aten::masked_scatter_backward"]


def test_tokens_are_put_where_masked_scatter_puts_them():
    torch.manual_seed(0)
    embeds, tokens = torch.randn(3, 11, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    is_image = (torch.randperm(33) < 9).view(3, 11)
    found = []
    for put in (put_tokens, lambda e, where, t: e.masked_scatter(where[..., None], t)):
        placed = put(embeds, is_image, tokens)
        found.append((placed, *torch.autograd.grad((placed * torch.arange(4.0)).sum(), (embeds, tokens))))
    assert all(torch.equal(*pair) for pair in zip(*found))


class Steps(TrainerCallback):
    """Counts the reads of each step from its first forward pass to its update."""

    def __init__(self):
        self.counts = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.waits = Waits()
        self.waits.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.waits.__exit__(None, None, None)
        self.counts.append(self.waits.found)


def test_the_trainer_reads_two_numbers_a_step_on_a_processor(recipe, tmp_path):
    """The loss, and how many samples there were, which lies on the host; optimizer and clipping read none."""
    steps, wanted = Steps(), recipe(logging_steps=3, max_steps=5)
    wanted.model.attn_implementation = "eager"  # the one for processors reads masks
    run(wanted, tmp_path / "run", callbacks=[steps])
    assert steps.counts == [["aten._local_scalar_dense"] * 2] * 5


class BetweenLogs(TrainerCallback):
    """From the third step on, whatever waits for the GPU fails, the steps' data included, but while it is logged."""

    def __init__(self):
        self.num_steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        logs = state.global_step % args.logging_steps == 0
        self.num_steps += not logs and state.global_step > 3
        torch.cuda.set_sync_debug_mode("error" if not logs and state.global_step >= 3 else "default")

    def on_log(self, args, state, control, **kwargs):
        torch.cuda.set_sync_debug_mode("error" if state.global_step >= 3 else "default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: it alone knows what makes the host wait")
def test_the_trainer_never_waits_for_a_gpu(recipe, tmp_path):
    wanted = recipe(use_cpu=False, bf16=True, logging_steps=5, max_steps=9, save_steps=100)
    between = BetweenLogs()
    wanted.model.dtype = "bfloat16"
    try:
        run(wanted, tmp_path / "run", callbacks=[between])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert between.num_steps == 5
