"""Vision LoRA on and off: on the layers asked for, merged in float32, and under autocast what PEFT computes."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from tiny import generate, logits_of, prompt, text, tiny_vora, train_a_little
from torch import nn

from vora import attach_vision_lora, merge_vision_lora
from vora.build.lora import keep_trained_in_fp32
from vora.build.lora_product import LoraLinear, use_lora_product
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


def test_no_library_complains_of_what_users_cannot_change():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_vision_lora(tiny_vora("llama"), rank=2)


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


def step(peft_model, inputs, in_bf16=True):
    """(loss, gradients, bytes kept for them)."""
    peft_model.zero_grad()
    torch.manual_seed(1)  # of GPT-2's dropout
    with Saved(peft_model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
        loss = peft_model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, saved.num_bytes


def as_peft_computes(peft_model):
    for layer in peft_model.modules():
        if isinstance(layer, LoraLinear):
            layer.__class__ = Linear
    return peft_model


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_one_product_is_what_peft_computes_and_keeps_less(family, recomputed):
    peft_model, inputs = half_with_lora(family), prompt([*text(4), (2, 3, 0), *text(20, 1)])
    exact = copy.deepcopy(peft_model).float()
    if recomputed:
        peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    loss, gradients, num_bytes = step(peft_model, inputs)
    theirs, of_peft, more_bytes = step(as_peft_computes(peft_model), inputs)
    expected, wanted, _ = step(as_peft_computes(exact), inputs, in_bf16=False)
    assert num_bytes <= more_bytes and abs(loss - expected) < 1.5 * abs(theirs - expected) + 0.01
    assert gradients.keys() == wanted.keys()

    def distance(found):
        return sum((found[name] - of_exact).norm() / of_exact.norm() for name, of_exact in wanted.items())

    assert distance(gradients) < 1.2 * distance(of_peft)


@pytest.mark.parametrize("alpha", [2, 6])
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_in_float32_it_is_the_same(family, alpha):
    peft_model, inputs = attach_vision_lora(tiny_vora(family), rank=2, lora_alpha=alpha), prompt([*text(4), (2, 3, 0)])
    train_a_little(peft_model)
    found, expected = (
        step(model, inputs, False) for model in (peft_model, as_peft_computes(copy.deepcopy(peft_model)))
    )
    torch.testing.assert_close(found[0], expected[0])
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6)
    with peft_model.disable_adapter():
        torch.testing.assert_close(logits_of(peft_model, **inputs), logits_of(tiny_vora(family), **inputs))


def test_what_is_more_than_lora_on_a_plain_layer_is_left_to_peft():
    inputs = torch.randn(2, 3, 8)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def hooked(layer):
        layer.register_forward_hook(lambda module, args, output: 3 * output)
        return layer

    kinds = {"plain": nn.Linear(8, 5), "subclass": Doubled(8, 5), "hooked": hooked(nn.Linear(8, 5))}
    for options in ({"lora_bias": True}, {"use_dora": True}, {}):
        config = LoraConfig(r=2, target_modules=list(kinds), init_lora_weights=False, **options)
        model = get_peft_model(nn.ModuleDict(copy.deepcopy(kinds)), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.data.normal_()
        use_lora_product(model)
        found = {kind: model.get_submodule(f"base_model.model.{kind}")(inputs) for kind in kinds}
        as_peft_computes(model)
        for kind, output in found.items():
            torch.testing.assert_close(output, model.get_submodule(f"base_model.model.{kind}")(inputs))
    use_lora_product(model)
    for shape in ((0, 8), (2, 0, 8), (8,)):
        assert model.get_submodule("base_model.model.plain")(torch.zeros(shape)).shape == (*shape[:-1], 5)


def test_its_output_may_be_changed_in_place():
    model = attach_vision_lora(tiny_vora("llama"), rank=2)
    y = model.get_base_model().model.blocks[0].self_attn.q_proj(torch.randn(1, 3, 32, requires_grad=True))
    y += 1  # as Falcon does
    y.sum().backward()


def test_without_autocast_inputs_are_cast():
    peft_model = half_with_lora("llama").eval()
    assert generate(peft_model, prompt([*text(4), (2, 3, 0), *text(3, 1)])).shape == (1, 6)
