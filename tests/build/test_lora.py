"""Vision LoRA on and off: on the layers asked for, merged in float32, and under autocast what PEFT computes."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from tiny import generate, logits_of, prompt, text, tiny_vora, train_a_little

from vora import attach_vision_lora, merge_vision_lora
from vora.build.lora import keep_trained_in_fp32
from vora.train.plan.memory import Saved


def test_lora_is_only_on_the_targets_asked_for_and_others_are_refused():
    with pytest.raises(ValueError, match=r"\['no_proj'\] match no linear layer.*q_proj"):
        attach_vision_lora(tiny_vora("llama"), target_modules=["q_proj", "no_proj"])
    for num_blocks in (0, 4):
        with pytest.raises(ValueError, match="the LLM has 3 blocks"):
            attach_vision_lora(tiny_vora("llama"), num_blocks=num_blocks)
    peft_model = attach_vision_lora(tiny_vora("llama"), rank=2, num_blocks=1, target_modules=["q_proj"])
    pairs = [name for name, _ in peft_model.named_parameters() if "lora_" in name]
    assert len(pairs) == 2 and all(".layers.0.self_attn.q_proj." in name for name in pairs)


@pytest.mark.parametrize("alpha", [1, 8])
def test_merging_keeps_the_scale(alpha):
    peft_model, inputs = attach_vision_lora(tiny_vora("llama"), rank=4, lora_alpha=alpha), prompt(text(9))
    train_a_little(peft_model)
    expected = logits_of(peft_model, **inputs)
    torch.testing.assert_close(logits_of(merge_vision_lora(peft_model), **inputs), expected, atol=1e-4, rtol=1e-4)


def test_merging_refuses_what_is_not_finite_and_what_has_no_lora():
    peft_model = attach_vision_lora(tiny_vora("llama"), rank=2)
    layer = peft_model.get_base_model().model.blocks[1].mlp.down_proj
    layer.lora_B["default"].weight.data[0, 0] = torch.inf
    before = copy.deepcopy(peft_model.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        merge_vision_lora(peft_model)
    after = peft_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(TypeError, match="no vision LoRA"):
        merge_vision_lora(tiny_vora("llama"))


def test_bfloat16_merges_in_float32():
    vora = tiny_vora("llama").bfloat16()
    peft_model = attach_vision_lora(vora, rank=4)
    train_a_little(peft_model)
    layer = peft_model.get_base_model().model.blocks[0].self_attn.q_proj
    pair = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
    expected = (layer.get_base_layer().weight.float() + pair).bfloat16()
    merged = merge_vision_lora(peft_model)
    assert torch.equal(merged.model.blocks[0].self_attn.q_proj.weight, expected)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.bfloat16}


def half_with_lora(family):
    peft_model = attach_vision_lora(tiny_vora(family).bfloat16(), rank=2).train()
    keep_trained_in_fp32(peft_model)
    train_a_little(peft_model)
    return peft_model


def step(peft_model, inputs):
    """(loss, gradients, bytes kept for them)."""
    peft_model.zero_grad()
    torch.manual_seed(1)  # of GPT-2's dropout
    with Saved(peft_model) as saved, torch.autocast("cpu", torch.bfloat16):
        loss = peft_model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, saved.num_bytes


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_the_same_to_the_last_bit_with_fewer_copies(family, recomputed):
    peft_model, inputs = half_with_lora(family), prompt([*text(4), (2, 3, 0), *text(20, 1)])
    if recomputed:
        peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients, num_bytes = step(peft_model, inputs)
    for layer in peft_model.modules():
        if isinstance(layer, LoraLayer):
            layer.cast_input_dtype_enabled = True
    expected, same, more_bytes = step(peft_model, inputs)
    assert torch.equal(loss, expected) and gradients.keys() == same.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0 and torch.equal(gradient, same[name]), name
    shared = family in ("llama", "gemma2") and not recomputed  # three projections of one input, and two of another
    assert num_bytes < 0.97 * more_bytes if shared else num_bytes <= more_bytes


def test_without_autocast_inputs_are_cast():
    peft_model = half_with_lora("llama").eval()
    assert generate(peft_model, prompt([*text(4), (2, 3, 0), *text(3, 1)])).shape == (1, 6)
