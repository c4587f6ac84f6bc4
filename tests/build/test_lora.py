"""Vision LoRA on and off: on the layers asked for, merged in float32, and under autocast what PEFT computes."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import generate, logits_of, prompt, text, tiny_vora, train_a_little

from vora import attach_vision_lora, merge_vision_lora
from vora.train.plan.memory import Saved

# text, image A of 2 x 4, image B of 3 x 3 touching it, text
TWO_IMAGES = [*text(4), (2, 4, 0), (3, 3, 1), *text(5, 1)]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_lora_targets_and_depth_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"\['no_proj'\] match no linear layer.*q_proj"):
        attach_vision_lora(tiny_vora("llama"), target_modules=["q_proj", "no_proj"])
    for num_blocks in (0, 4):
        with pytest.raises(ValueError, match="the LLM has 3 blocks"):
            attach_vision_lora(tiny_vora("llama"), num_blocks=num_blocks)


def test_lora_only_on_the_targets_asked_for():
    learner = attach_vision_lora(tiny_vora("llama"), rank=2, num_blocks=1, target_modules=["q_proj"])
    pairs = [name for name, _ in learner.named_parameters() if "lora_" in name]
    assert len(pairs) == 2 and all(".layers.0.self_attn.q_proj." in name for name in pairs)


@pytest.mark.parametrize("alpha", [1, 8])
def test_merging_keeps_the_scale(alpha):
    learner = attach_vision_lora(tiny_vora("llama"), rank=4, lora_alpha=alpha)
    train_a_little(learner)
    expected = logits_of(learner, **prompt(TWO_IMAGES))
    close(logits_of(merge_vision_lora(learner), **prompt(TWO_IMAGES)), expected)


def test_merging_refuses_what_is_not_finite_and_what_has_no_lora():
    learner = attach_vision_lora(tiny_vora("llama"), rank=2)
    layer = learner.get_base_model().model.blocks[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        merge_vision_lora(learner)
    after = learner.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(TypeError, match="no vision LoRA"):
        merge_vision_lora(tiny_vora("llama"))


def test_bfloat16_merges_in_float32():
    vora = tiny_vora("llama").bfloat16()
    learner = attach_vision_lora(vora, rank=4)
    train_a_little(learner)
    layer = learner.get_base_model().model.blocks[0].self_attn.q_proj
    pair = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.get_base_layer().weight.float() + pair).bfloat16()
    merged = merge_vision_lora(learner)
    assert torch.equal(merged.model.blocks[0].self_attn.q_proj.weight, expected)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


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
