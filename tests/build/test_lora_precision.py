"""LoRA in float32 on an LLM in bf16 computes under autocast what PEFT computes, and keeps fewer copies for it."""

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import generate, prompt, text, tiny_vora

from vora import attach_vision_lora
from vora.train.plan.memory import Saved


def half_with_lora(family):
    learner = attach_vision_lora(tiny_vora(family).bfloat16(), rank=2).train()
    torch.manual_seed(0)
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return learner


def step(learner, inputs):
    """(loss, gradients, bytes kept for them)."""
    learner.zero_grad()
    torch.manual_seed(1)  # of GPT-2's dropout
    with Saved(learner) as saved, torch.autocast("cpu", torch.bfloat16):
        loss = learner(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, saved.num_bytes


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_same_to_the_last_bit_with_fewer_copies(family, recomputed):
    learner, inputs = half_with_lora(family), prompt([*text(4), (2, 3, 0), *text(20, 1)])
    if recomputed:
        learner.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients, num_bytes = step(learner, inputs)
    for layer in learner.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True
    expected, same, more_bytes = step(learner, inputs)
    assert torch.equal(loss, expected) and gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, same[name]), name
    shared = family in ("llama", "gemma2") and not recomputed  # three projections of one input, and two of another
    assert num_bytes < 0.97 * more_bytes if shared else num_bytes <= more_bytes


def test_without_autocast_inputs_are_cast():
    learner = half_with_lora("llama").eval()
    assert generate(learner, prompt([*text(4), (2, 3, 0), *text(3, 1)])).shape == (1, 6)
