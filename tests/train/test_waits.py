"""A training step never waits for its device, but to log. Without a GPU the device is torch's `meta`: tensors on it
have no values, so that whoever reads one fails, and what is sent to it can be counted."""

import pytest
import torch
from packed import Waits, objective_of, questions
from runs import run
from tiny import IMAGE, PATCH, SHAPE
from tiny_teachers import TEACHERS, tiny_vit
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from vora import Teacher, VoraImageProcessor, attach_vision_lora
from vora.data.packing import collate_sequences, cut_after_images, label_weights, places, share_prefixes
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.model.patch_embed import put_tokens
from vora.train.trainer import ON_HOST


class Sent(TorchDispatchMode):
    """Counts what goes from the host to the device while the host waits, and what comes back."""

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


def batch_of(distill_only=False):
    """A batch as the trainer hands it on, on the device but for what only the host reads."""
    samples = [share_prefixes(questions(0)), share_prefixes(questions(1, 1))]
    if distill_only:
        samples = [cut_after_images(one, IMAGE) for one in samples]
    batch = collate_sequences([[one] for one in samples], 64, pad_token_id=0)
    batch |= places(batch, IMAGE) | {"label_weights": label_weights(batch, 1.0)}
    return {name: value if name in ON_HOST else value.to("meta") for name, value in batch.items()}


HOW = ("recomputed", "in parts", "images alone", "bf16", "all targets")
FAMILIES = ("llama", "gemma3_text", "gpt_neox")


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
        monkeypatch.setattr("vora.model.label_loss.MOST_LOGITS", 2 * SHAPE["vocab_size"])
    assert teacher.device.type == "cpu"
    batch = batch_of(how == "images alone")
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
