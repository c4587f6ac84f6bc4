"""Several patches to one image token: the counts agree everywhere, and the rule of attention holds."""

from functools import partial

import pytest
import torch
from messages import assistant, coloured, encode, user
from tiny import GRID, PATCH, prompt, states_of_blocks, text, tiny_vora
from tiny_teachers import tiny_vit

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, VoraProcessor
from vora.distill.blockwise import BlockwiseDistillation
from vora.distill.objective import Objective

MERGE = 2
merged_prompt = partial(prompt, patch_merge=MERGE)
SIZES = {"patch_size": PATCH, "image_size": PATCH * GRID, "patch_merge": MERGE}


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_every_patch_moves_its_whole_image_and_nothing_before(family):
    vora = tiny_vora(family, patch_merge=MERGE)
    inputs = merged_prompt([*text(3), (1, 2, 0), (2, 2, 1), *text(2, 1)])  # 8 and 16 patches
    plain = states_of_blocks(vora, **inputs)
    for patch, first, end in [(0, 3, 5), (7, 3, 5), (8, 5, 9), (23, 5, 9)]:
        pixels = inputs["pixel_values"].clone()
        pixels[patch] += 1
        for before, after in zip(plain, states_of_blocks(vora, **{**inputs, "pixel_values": pixels})):
            moved = (before != after).any(-1)[0]
            assert moved[first:end].all() and not moved[:first].any()
    inputs["image_grid_thw"][0, 1] *= 2
    counts = "6 image tokens but the 2 images given have 32 patches, which make 8 at patch_merge 2"
    with pytest.raises(ValueError, match=counts):
        vora(**inputs)


@pytest.mark.parametrize("size", [(12, 12), (40, 9), (3, 60), (1, 1)])
def test_the_processor_makes_as_many_tokens_as_the_model_expects(llm_folder, size):
    processor = VoraProcessor.from_llm(llm_folder, min_image_tokens=1, max_image_tokens=6, **SIZES)
    messages = [user(coloured("red", size), "what?"), assistant("red")]
    inputs = encode(processor, messages[:1])
    for made in (inputs, processor.training_sample(messages)):
        rows, columns = made["image_grid_thw"][0, 1:].tolist()
        assert rows % MERGE == columns % MERGE == 0
        count = (made["input_ids"] == processor.image_token_id).sum()
        assert count == rows * columns // MERGE**2 <= 6
        assert len(made["pixel_values"]) == rows * columns
    assert processor._get_num_multimodal_tokens([size[::-1]])["num_image_tokens"] == [count]
    VoraForConditionalGeneration.from_llm(llm_folder, **SIZES)(**inputs)


def test_a_head_learns_the_mean_feature_of_the_patches_of_its_token():
    teacher = Teacher(tiny_vit("vit", image_size=4 * PATCH))
    student = tiny_vora("llama", patch_merge=MERGE)
    distillation = BlockwiseDistillation([(0, 0)], 32, 24, center=False)
    learner = Objective(student, VoraImageProcessor(patch_size=PATCH), teacher, distillation)
    inputs = merged_prompt([(2, 2, 0), 20])
    (taught,) = learner.teach(inputs["pixel_values"], inputs["image_grid_thw"]).values()
    pixels = inputs["pixel_values"].view(4, 4, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
    pixels = pixels.reshape(3, 4 * PATCH, 4 * PATCH) * 0.5 + 0.5
    (raster,) = teacher([pixels], [(4, 4)], [0]).values()
    torch.testing.assert_close(taught[1], raster[[2, 3, 6, 7]].mean(0))  # token 1: the upper right square
    losses = learner(torch.full_like(inputs["input_ids"], -100), **inputs)
    states = distillation.heads["0"](states_of_blocks(student, **inputs)[0][0, :4])
    expected = 1 - torch.cosine_similarity(states, taught, dim=-1).mean()
    torch.testing.assert_close(losses["distill_loss"], expected)
