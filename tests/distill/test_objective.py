"""The losses of a training step: named, weighted and summed over one forward pass."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import FAMILIES, IMAGE, PATCH, SHAPE, prompt, states_of_blocks, text, tiny_vora
from tiny_teachers import tiny_vit

from vora import Teacher, VoraImageProcessor, attach_vision_lora, merge_vision_lora
from vora.distill.blocks import only_first_blocks
from vora.distill.blockwise import SUMMARY, BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective, Term
from vora.distill.teacher import images_of_patches


def objective_of(family="llama", pairs=None, **options):
    """LoRA in all blocks, a ViT of four as the teacher."""
    teacher = Teacher(tiny_vit("vit"))
    student = attach_vision_lora(tiny_vora(family), rank=2)
    distillation = BlockwiseDistillation(pairs or block_pairs(3, 4), SHAPE["hidden_size"], 24, **options)
    torch.manual_seed(3)
    return Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation, distill_weight=0.5)


@pytest.fixture
def objective():
    return objective_of()


def batch():
    inputs = prompt([*text(3), (2, 3, 0), (3, 3, 1), *text(4, 2)])
    inputs["targets"] = torch.cat([inputs["input_ids"][:, 1:], torch.full((1, 1), -100)], 1)
    inputs["targets"][:, :17] = -100
    return inputs


def test_losses_are_named_and_summed_once(objective):
    losses = objective(**batch())
    assert set(losses) == {"loss", "lm_loss", "distill_loss", "pair_losses"}
    torch.testing.assert_close(losses["loss"], losses["lm_loss"] + 0.5 * losses["distill_loss"])
    torch.testing.assert_close(losses["pair_losses"].mean(), losses["distill_loss"].detach())
    assert losses["pair_losses"].shape == (3,)
    inputs = batch()
    labels = torch.nn.functional.pad(inputs.pop("targets")[:, :-1], (1, 0), value=-100)
    torch.testing.assert_close(objective.vora(**inputs, labels=labels).loss, losses["lm_loss"])


def test_gradients_reach_lora_patch_embedding_and_heads_and_nothing_else(objective):
    objective(**batch())["loss"].backward()
    for name, parameter in objective.named_parameters():
        trains = "lora_" in name or ".patch_embedding.modules_to_save." in name or name.startswith("distillation")
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())


def test_student_and_teacher_are_compared_patch_by_patch(objective):
    inputs = batch()
    inputs.pop("targets")
    seen = {}
    objective.distillation.forward = lambda student, teacher: seen.update(student=student, teacher=teacher) or (0, 0)
    objective(**batch())
    is_image = inputs["input_ids"] == IMAGE
    for block, states in enumerate(states_of_blocks(objective.vora, **inputs)):
        torch.testing.assert_close(seen["student"][block], states[is_image])
    grids = [(2, 3), (3, 3)]
    images = images_of_patches(inputs["pixel_values"], grids, PATCH, [0.5] * 3, [0.5] * 3)
    for block, features in objective.teacher(images, grids, [0, 1, 2]).items():
        torch.testing.assert_close(seen["teacher"][block], features)


def test_teacher_and_heads_never_enter_a_saved_model(objective, tmp_path):
    assert not any("teacher" in name or "vit" in name for name in objective.state_dict())
    merged = merge_vision_lora(objective.student)
    merged.save_pretrained(tmp_path)
    saved = set(load_file(tmp_path / "model.safetensors"))
    fresh = set(tiny_vora("llama").state_dict())
    assert saved and saved <= fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_distilling_alone_runs_the_first_blocks_and_finds_what_all_of_them_would(family):
    objective, inputs = objective_of(family, pairs=[(0, 1), (1, 2)]), batch()
    inputs["targets"].fill_(-100)
    language_model, ran, found = objective.vora.model.language_model, [], []
    names = list(objective.state_dict())
    for number, block in enumerate(objective.vora.model.blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    for distill_only in (True, False):
        objective.zero_grad()
        objective.distillation.num_updates.zero_()
        losses = objective(**inputs, distill_only=distill_only)
        losses["loss"].backward()
        gradients = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        found.append((losses["loss"].detach(), {name: grad.clone() for name, grad in gradients.items()}))
    assert ran == [0, 1, 0, 1, 2]
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) > 8 and all(torch.equal(grad, found[1][1][name]) for name, grad in found[0][1].items())
    assert list(objective.state_dict()) == names and len(objective.vora.model.blocks) == 3
    with pytest.raises(KeyError), only_first_blocks(language_model, objective.vora.model.blocks, 1):
        raise KeyError
    assert len(objective.vora.model.blocks) == 3  # whatever happens


class Shrink(Term):
    """A term of one's own: the squared length of LoRA's B."""

    def applies(self, objective, batch):
        return True

    def __call__(self, objective, batch):
        loss = sum(p.square().sum() for name, p in objective.named_parameters() if "lora_B" in name)
        return loss, {"shrink_loss": loss}


def test_terms_are_weighted_and_may_be_added(objective):
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.1)
    before = objective(**batch())
    objective.terms.append(Shrink(3.0))
    after = objective(**batch())
    assert after["shrink_loss"] > 0
    torch.testing.assert_close(after["loss"], before["loss"] + 3 * after["shrink_loss"])


def test_the_summary_is_the_cls_token_at_every_token_of_its_own_image():
    objective, inputs = objective_of(pairs=[*block_pairs(3, 4), (2, SUMMARY)], standardize=True), batch()
    targets = objective.teach(inputs["pixel_values"], inputs["image_grid_thw"])
    sizes = inputs["image_grid_thw"].prod(-1).tolist()
    first, second = targets[SUMMARY].split(sizes)
    assert torch.equal(first, first[:1].expand_as(first)) and torch.equal(second, second[:1].expand_as(second))
    assert not torch.equal(first[0], second[0])
    grids, processor = [tuple(grid[1:]) for grid in inputs["image_grid_thw"].tolist()], objective.image_processor
    pixels = images_of_patches(inputs["pixel_values"], grids, PATCH, processor.image_mean, processor.image_std)
    pixels = objective.teacher.resize(pixels[:1], grids[0])
    own = objective.teacher.vit(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(first[0], own[0, 0])
    losses = objective(**batch())
    assert losses["pair_losses"].shape == (4,) and objective.distillation.pairs[-1] == (2, SUMMARY)
    losses["loss"].backward()
    assert objective.distillation.heads[SUMMARY][1].weight.grad.abs().sum() > 0


def count_runs(objective):
    """list of how often each block of the LLM computes, recomputation included, from now on."""
    counts = [0] * len(objective.vora.model.blocks)
    for block, module in enumerate(objective.vora.model.blocks):

        def count(*_, block=block):
            counts[block] += 1

        module.self_attn.register_forward_pre_hook(count)
    return counts


@pytest.mark.parametrize("num_blocks", [0, 4])
def test_as_many_blocks_as_there_are_can_be_checkpointed(objective, num_blocks):
    with pytest.raises(ValueError, match=f"{num_blocks} blocks .* the LLM has 3"):
        objective.gradient_checkpointing_enable(num_blocks=num_blocks)


@pytest.mark.parametrize("num_blocks", [None, 1, 2])
@pytest.mark.parametrize("distill_only", [False, True])
def test_checkpointed_blocks_learn_the_same(objective, distill_only, num_blocks):
    inputs, found = batch(), []
    if distill_only:
        inputs["targets"].fill_(-100)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    objective.train()
    for checkpointed in (False, True):
        if checkpointed:
            objective.gradient_checkpointing_enable(num_blocks=num_blocks)
            ran = count_runs(objective)
        objective.zero_grad()
        objective.distillation.num_updates.zero_()
        objective(**inputs)["loss"].backward()
        found.append({name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None})
    assert objective.distillation.recomputes
    assert ran == [2 if num_blocks is None or block < num_blocks else 1 for block in range(3)]
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)
