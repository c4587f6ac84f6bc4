"""Norms and MLPs that keep less for the backward pass: the same losses and gradients, fewer bytes."""

import copy
import pickle

import pytest
import torch
from tiny import prompt, text, tiny_vora, train_a_little
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from vora import attach_vision_lora, merge_vision_lora
from vora.build.fewer_activations import LeanMLP, LeanNorm, keep_all_activations, keep_fewer_activations
from vora.train.plan.memory import Saved

# (norms, MLPs) that are written as Llama's are, in three blocks and before the output
REPLACED = {"llama": (7, 3), "qwen3": (13, 3), "gemma3_text": (0, 3), "phi3": (7, 0), "gpt2": (0, 0)}


def replaced(model):
    return tuple(sum(isinstance(module, kind) for module in model.modules()) for kind in (LeanNorm, LeanMLP))


def step(model, inputs):
    """(loss, gradients, bytes kept for them)."""
    with Saved(model) as saved:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, saved.num_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", REPLACED)
def test_losses_and_gradients_are_the_same_and_fewer_bytes_are_kept(family, dtype):
    model = attach_vision_lora(tiny_vora(family), rank=2).to(dtype).eval()
    train_a_little(model)
    assert replaced(model) == REPLACED[family]
    inputs, plain = prompt([*text(4), (2, 3, 0), *text(20, 1)]), copy.deepcopy(model)
    keep_all_activations(plain)
    assert replaced(plain) == (0, 0) and replaced(model) == REPLACED[family]
    (loss, gradients, kept), (expected, wanted, all_kept) = step(model, inputs), step(plain, inputs)
    norms, mlps = REPLACED[family]
    fewer = mlps or norms and dtype == torch.bfloat16  # in float32 a norm keeps its input either way
    assert kept < all_kept if fewer else kept == all_kept
    assert gradients.keys() == wanted.keys()
    if dtype == torch.float32:
        assert torch.equal(loss, expected)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    for name, gradient in wanted.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(gradients[name] / scale, gradient / scale, **tolerance)


def test_merged_models_are_as_transformers_writes_them():
    merged = merge_vision_lora(attach_vision_lora(tiny_vora("llama"), rank=2))
    assert replaced(merged) == (0, 0)


def test_models_are_pickled():
    model, inputs = attach_vision_lora(tiny_vora("llama"), rank=2), prompt(text(5))
    again = pickle.loads(pickle.dumps(model))
    assert replaced(again) == replaced(model) == (7, 3) and type(again) is type(model)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_norm_that_trains_gets_its_gradient():
    norm = LlamaRMSNorm(8)
    keep_fewer_activations(norm)
    norm(torch.randn(3, 8)).sum().backward()
    assert norm.weight.grad is not None
