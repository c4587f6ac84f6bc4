"""The loss made in parts is the loss made at once, and never holds more logits than it may."""

import pytest
import torch
from tiny import prompt, text, tiny_vora

from vora.distill import label_loss
from vora.train.plan.memory import Saved

VOCABULARY = 128


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("most", [4 * VOCABULARY, 7 * VOCABULARY, VOCABULARY // 2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere", "phi"])
def test_parts_add_up_to_the_whole(family, most, trained, monkeypatch):
    """Gemma caps its logits, Granite and Cohere scale them, Gemma's and Cohere's heads are tied, Phi's has a bias."""
    vora = tiny_vora(family)
    vora.lm_head.requires_grad_(trained)
    inputs = prompt([*text(3), (2, 3, 0), *text(17, 1)])
    labels = inputs["input_ids"].clone()
    labels[:, :10] = labels[:, 12] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    places = (targets != -100).flatten().nonzero()[:, 0]
    num_labels = len(places)
    made, losses, gradients = [], [vora(**inputs, labels=labels).loss], []
    vora.lm_head.register_forward_hook(lambda module, args, logits: made.append(logits.shape))
    for most_logits in (label_loss.MOST_LOGITS, most):
        monkeypatch.setattr(label_loss, "MOST_LOGITS", most_logits)
        vora.zero_grad()
        made.clear()
        losses.append(label_loss.label_losses(vora, vora.model(**inputs).last_hidden_state, targets, places).mean())
        losses[-1].backward()
        gradients.append({name: p.grad.clone() for name, p in vora.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1:], losses[:1] * 2, rtol=1e-6, atol=0)
    whole, parts = gradients
    assert whole.keys() == parts.keys() and any("patch_embedding" in name for name in parts)
    assert (vora.lm_head.weight.grad is not None) == trained
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    of_labels = [shape[0] for shape in made if len(shape) == 2]
    assert max(of_labels) == max(1, -(-num_labels // -(-num_labels * VOCABULARY // most)))
    assert sum(of_labels) == 2 * num_labels  # forward and again in backward


@pytest.mark.parametrize("bf16", [False, True])
def test_memory_is_that_of_one_part(bf16, monkeypatch):
    vora, kept = tiny_vora("gemma2"), []
    states, targets = torch.randn(1, 200, 32, requires_grad=True), torch.randint(0, VOCABULARY, (1, 200))
    weights = vora.lm_head.requires_grad_(False)
    losses = []
    for most in (label_loss.MOST_LOGITS, 50 * VOCABULARY):
        monkeypatch.setattr(label_loss, "MOST_LOGITS", most)
        with Saved(weights) as saved, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses.append(label_loss.label_losses(vora, states, targets, torch.arange(200)).detach())
        kept.append(saved.num_bytes)
    assert kept[0] > 200 * VOCABULARY * 4 and kept[1] < 200 * 32 * 4 * 3  # states and targets
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
