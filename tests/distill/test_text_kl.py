"""Text alone: the LLM without LoRA teaches it, so that seeing does not cost language."""

import copy
import runpy
import sysconfig
from itertools import islice
from pathlib import Path

import pytest
import torch
from tiny import logits_of, text, tiny_vora

from vora import attach_vision_lora
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
from vora.distill import label_loss
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.distill.text_kl import lora_off, unexplained
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import load_recipe

T = 24  # tokens of a row
LENGTHS = (20, 13)


def objective_of(disturbed=0.1):
    """(objective whose LoRA and distillation reach the first two blocks, the LLM as it was)."""
    vora = tiny_vora("llama")
    llm = copy.deepcopy(vora)
    student = attach_vision_lora(vora, rank=4, num_blocks=2)
    torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            parameter.data += disturbed * torch.randn_like(parameter)
    distillation = BlockwiseDistillation(block_pairs(2, 2), 32, 24)
    return Objective(student, None, None, distillation, text_kl_weight=2.0), llm


def batch(distill_only):
    """Rows of text to keep, the second one padded."""
    ids = torch.tensor([text(length, seed) + [0] * (T - length) for seed, length in enumerate(LENGTHS)])
    return {
        "input_ids": ids,
        "targets": torch.full_like(ids, -100),
        "position_ids": torch.arange(T).expand(2, T),
        "seen_until": torch.tensor([[length - 1] * length + list(range(length, T)) for length in LENGTHS]),
        "text_rows": torch.arange(2),
        "text_places": torch.cat([row * T + torch.arange(length) for row, length in enumerate(LENGTHS)]),
        "distill_only": torch.tensor(distill_only),
    }


@pytest.mark.parametrize("distill_only", [True, False])
def test_untrained_lora_has_changed_nothing(distill_only):
    losses = objective_of(disturbed=0.0)[0](**batch(distill_only))
    assert losses["text_loss"].item() == pytest.approx(0, abs=1e-6)
    assert losses.keys() == {"loss", "text_loss"}


def test_it_is_the_divergence_from_the_bare_llm():
    objective, llm = objective_of()
    losses = objective(**batch(distill_only=False))
    found = []
    for seed, length in enumerate(LENGTHS):
        ids = torch.tensor([text(length, seed)])
        wanted, found_logits = (logits_of(model, input_ids=ids).log_softmax(-1)[0] for model in (llm, objective.vora))
        found.append((wanted.exp() * (wanted - found_logits)).sum(-1))
    expected = torch.cat(found).mean()
    assert expected > 1e-3
    torch.testing.assert_close(losses["text_loss"], expected)
    torch.testing.assert_close(losses["loss"], 2 * expected)


@pytest.mark.parametrize("distill_only", [True, False])
def test_every_token_counts_alike_however_a_step_is_split(distill_only):
    objective, _ = objective_of()
    whole = batch(distill_only)
    total, parts = len(whole["text_places"]), []
    for row, length in enumerate(LENGTHS):
        one = {name: whole[name][row : row + 1] for name in ("input_ids", "targets", "position_ids", "seen_until")}
        one |= {
            "text_rows": torch.arange(1),
            "text_places": torch.arange(length),
            "distill_only": whole["distill_only"],
        }
        losses = objective(**one, num_micro_batches=8, num_text_tokens=total)
        torch.testing.assert_close(losses["loss"], objective.terms[1].weight * losses["text_loss"] * length / total)
        parts.append(losses["loss"])
    if not distill_only:  # else distances are relative to the variance over a micro-batch's tokens
        torch.testing.assert_close(sum(parts), objective(**whole)["loss"])


def test_a_batch_with_nothing_to_learn_is_refused():
    objective, _ = objective_of()
    given = {name: value for name, value in batch(False).items() if not name.startswith("text_")}
    with pytest.raises(ValueError, match="All .* labels are masked .*nothing to learn"):
        objective(**given)


@pytest.mark.parametrize("most, longest", [(10 * 128, 5), (128, 1)])
def test_divergence_in_parts_is_that_at_once(most, longest, monkeypatch):
    found = []
    for limit in (label_loss.MOST_LOGITS, most):
        monkeypatch.setattr(label_loss, "MOST_LOGITS", limit)
        objective, _ = objective_of()
        made = []
        objective.vora.lm_head.register_forward_hook(lambda module, args, logits: made.append(len(logits)))
        loss = objective(**batch(distill_only=False))["text_loss"]
        loss.backward()
        found.append((loss, {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}, made))
    (loss, gradients, at_once), (same, equal, in_parts) = found
    assert at_once == [33, 33] and max(in_parts) == longest and sum(in_parts) == 4 * 33  # again for gradients
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(equal, gradients, rtol=1e-4, atol=1e-7)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-4


def test_with_images_alone_it_is_the_last_objective_block():
    objective, _ = objective_of()
    ran = []
    for number, block in enumerate(objective.vora.model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    loss = objective(**batch(distill_only=True))["text_loss"]
    assert set(ran) == {0, 1} and loss > 1e-3
    loss.backward()
    grown = {name for name, p in objective.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert grown and all("lora" in name for name in grown)
    # a batch with labels never ends there, as where planning by the clock measures words before images
    found = objective(**batch(distill_only=True) | {"targets": torch.full((2, T), 7)})
    assert "lm_loss" in found and "text_loss" in found


def test_rare_large_channels_do_not_stand_for_the_others():
    torch.manual_seed(0)
    own = torch.randn(50, 32) * torch.tensor([1000.0] + [1.0] * 31)
    noisy = own.clone()
    noisy[:, 1:] += torch.randn(50, 31)
    assert unexplained(noisy, own) > 0.5 and unexplained(own, own) == 0


def test_lora_is_back_even_after_an_error():
    objective, llm = objective_of()
    ids = torch.tensor([text(9)])
    with_lora = logits_of(objective.vora, input_ids=ids)
    with pytest.raises(KeyError), lora_off(objective.vora):
        torch.testing.assert_close(logits_of(objective.vora, input_ids=ids), logits_of(llm, input_ids=ids))
        raise KeyError
    torch.testing.assert_close(logits_of(objective.vora, input_ids=ids), with_lora)


def test_rows_hold_text_to_keep_or_images(sources, llm_folder):
    processor = VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    loaded = [load_source(path) for path in sources]
    rows = PackedSequences(loaded, processor, 64, distill_only_sequences=20, text_kl_weight=True)
    drawn, of_text = [], []
    for number, samples in enumerate(islice(iter(rows), 60)):
        (has_images,) = {"pixel_values" in sample for sample in samples}
        drawn.append(samples)
        of_text.append(not has_images)
        made = rows.collate([samples])
        assert bool(made["distill_only"]) == (number < 20) and ("text_rows" in made) != has_images
        assert bool((made["targets"] != -100).any()) == (has_images and number >= 20)
    assert all(any(kinds) and not all(kinds) for kinds in (of_text[:20], of_text[20:]))
    made, kept = rows.collate(drawn), torch.tensor(of_text).nonzero()[:, 0]
    assert torch.equal(made["text_rows"], kept)
    expected = [token for index in kept for sample in drawn[index] for token in sample["input_ids"]]
    assert made["input_ids"][kept].flatten()[made["text_places"]].tolist() == expected
    plain = PackedSequences(loaded, processor, 64)
    assert any((rows.collate([row])["targets"] != -100).any() for row in islice(iter(plain), 5))
    alone = PackedSequences([load_source(sources[1])], processor, 64, text_kl_weight=True)
    with pytest.raises(ValueError, match="holds an image, but with lora.text_kl_weight text alone teaches nothing"):
        list(islice(iter(alone), 30))
    with pytest.raises(ValueError, match="data.text_only leaves text alone"):
        data = {"sources": [{"path": "x"}], "text_only": True}
        load_recipe({"model": {"llm": "x"}, "lora": {"text_kl_weight": 1}, "data": data})


def test_docstrings_become_texts_of_bounded_length(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "text_from_docstrings.py"))
    long, short = " ".join(["word"] * 60), "too short"
    assert list(script["pieces"](f"{long}\n\n{long}\n\n{long}", 650)) == [f"{long}\n\n{long}", long]
    table = " ".join(["cell"] * 300)
    (tmp_path / "a.py").write_text(f'"""{table}\n\n{long}\n\n{short}"""\n\n\ndef f():\n    """{short}"""\n')
    assert list(script["docstrings"](tmp_path, 300)) == [long]  # the table before it is too long, the rest too short
    assert next(script["docstrings"](Path(sysconfig.get_path("stdlib"), "json"), 700))
