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


def batch(predicts=True):
    inputs = prompt([*text(3), (2, 3, 0), (3, 3, 1), *text(4, 2)])
    inputs["targets"] = torch.cat([inputs["input_ids"][:, 1:], torch.full((1, 1), -100)], 1)
    inputs["targets"][:, : 17 if predicts else None] = -100
    return inputs


def gradients_of(objective, **inputs):
    """(loss, {name: gradient}) of a step from the moments of the start."""
    objective.zero_grad()
    objective.distillation.num_updates.zero_()
    objective.distillation.has_moments = False
    loss = objective(**inputs)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


def disturb(objective):
    torch.manual_seed(4)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)


def test_losses_are_named_and_summed_once(objective):
    losses = objective(**batch())
    assert set(losses) == {"loss", "lm_loss", "distill_loss", "pair_losses"}
    torch.testing.assert_close(losses["loss"], losses["lm_loss"] + 0.5 * losses["distill_loss"])
    torch.testing.assert_close(losses["pair_losses"].mean(), losses["distill_loss"].detach())
    assert losses["pair_losses"].shape == (3,)
    inputs = batch()
    labels = torch.nn.functional.pad(inputs.pop("targets")[:, :-1], (1, 0), value=-100)
    torch.testing.assert_close(objective.vora(**inputs, labels=labels).loss, losses["lm_loss"])


def test_gradients_reach_lora_patch_embedding_and_heads_and_nothing_else(objective, tmp_path):
    objective(**batch())["loss"].backward()
    for name, parameter in objective.named_parameters():
        trains = "lora_" in name or ".patch_embedding.modules_to_save." in name or name.startswith("distillation")
        assert (parameter.grad is not None) == trains == parameter.requires_grad, name
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    assert not any("teacher" in name or "vit" in name for name in objective.state_dict())
    merge_vision_lora(objective.student).save_pretrained(tmp_path)  # nor do teacher and heads enter a saved model
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved and saved <= set(tiny_vora("llama").state_dict())


def test_student_and_teacher_are_compared_patch_by_patch(objective):
    inputs = batch()
    inputs.pop("targets")
    seen = {}
    objective.distillation.forward = lambda student, teacher, count: (
        seen.update(student=student, teacher=teacher) or (0, 0)
    )
    objective(**batch())
    is_image = inputs["input_ids"] == IMAGE
    for block, states in enumerate(states_of_blocks(objective.vora, **inputs)):
        torch.testing.assert_close(seen["student"][block], states[is_image])
    grids = [(2, 3), (3, 3)]
    images = images_of_patches(inputs["pixel_values"], grids, PATCH, [0.5] * 3, [0.5] * 3)
    for block, features in objective.teacher(images, grids, [0, 1, 2]).items():
        torch.testing.assert_close(seen["teacher"][block], features)


@pytest.mark.parametrize("family", FAMILIES)
def test_distilling_alone_runs_the_first_blocks_and_finds_what_all_of_them_would(family):
    objective, ran = objective_of(family, pairs=[(0, 1), (1, 2)]), []
    blocks, names = objective.vora.model.blocks, list(objective.state_dict())
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    early, whole = (gradients_of(objective, **batch(predicts=False), distill_only=only) for only in (True, False))
    assert ran == [0, 1, 0, 1, 2]
    assert torch.equal(early[0], whole[0])
    assert len(early[1]) > 8 and all(torch.equal(grad, whole[1][name]) for name, grad in early[1].items())
    with pytest.raises(KeyError), only_first_blocks(objective.vora.model.language_model, blocks, 1):
        raise KeyError
    assert list(objective.state_dict()) == names and len(objective.vora.model.blocks) == 3  # whatever happens


class Shrink(Term):
    """A term of one's own: the squared length of LoRA's B."""

    def applies(self, objective, batch):
        return True

    def __call__(self, objective, batch):
        loss = sum(p.square().sum() for name, p in objective.named_parameters() if "lora_B" in name)
        return loss, {"shrink_loss": loss}


def test_terms_are_weighted_and_may_be_added(objective):
    disturb(objective)
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


@pytest.mark.parametrize("num_blocks", [None, 1, 2])
@pytest.mark.parametrize("predicts", [False, True])
def test_checkpointed_blocks_learn_the_same(objective, predicts, num_blocks):
    disturb(objective)
    objective.train()
    _, expected = gradients_of(objective, **batch(predicts))
    objective.gradient_checkpointing_enable(num_blocks=num_blocks)
    ran = [0, 0, 0]  # how often each block computes, again for gradients included
    for block, module in enumerate(objective.vora.model.blocks):

        def count(*_, block=block):
            ran[block] += 1

        module.self_attn.register_forward_pre_hook(count)
    _, found = gradients_of(objective, **batch(predicts))
    assert objective.distillation.recomputes
    assert ran == [2 if num_blocks is None or block < num_blocks else 1 for block in range(3)]
    assert len(found) > 10
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"{wrong} blocks .* the LLM has 3"):
            objective.gradient_checkpointing_enable(num_blocks=wrong)
