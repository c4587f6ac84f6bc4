"""Several patches to one image token: the counts agree everywhere, and the rule of attention holds."""

import pytest
import torch
from PIL import Image
from tiny import GRID, IMAGE, PATCH, generate, image, prompt, states_of_blocks, text, tiny_llm
from transformers import ViTConfig, ViTModel

from vora import Teacher, VoraForConditionalGeneration, VoraImageProcessor, VoraProcessor
from vora.distill.blockwise import BlockwiseDistillation
from vora.distill.objective import Objective

MERGE = 2
SIZES = {"patch_size": PATCH, "image_size": PATCH * GRID, "patch_merge": MERGE}


@pytest.fixture(params=["llama", "mistral", "gemma2"])
def vora(request):
    torch.manual_seed(0)
    return VoraForConditionalGeneration.from_llm(tiny_llm(request.param), image_token_id=IMAGE, **SIZES)


def merged_prompt(*rows):
    """As `tiny.prompt`, for images given in tokens: MERGE times as many patches each way."""
    inputs = prompt(*rows)
    shapes = [part for row in rows for part in row if not isinstance(part, int)]
    images = [image(MERGE * h, MERGE * w, seed) for h, w, seed in shapes]
    grids = torch.tensor([(1, MERGE * h, MERGE * w) for h, w, _ in shapes])
    return inputs | {"pixel_values": torch.cat(images), "image_grid_thw": grids}


def test_every_patch_moves_its_whole_image_and_nothing_before(vora):
    inputs = merged_prompt([*text(3), (1, 2, 0), (2, 2, 1), *text(2, 1)])  # 8 and 16 patches
    plain = states_of_blocks(vora, **inputs)
    for patch, first, end in [(0, 3, 5), (7, 3, 5), (8, 5, 9), (23, 5, 9)]:
        pixels = inputs["pixel_values"].clone()
        pixels[patch] += 1
        for before, after in zip(plain, states_of_blocks(vora, **{**inputs, "pixel_values": pixels})):
            moved = (before != after).any(-1)[0]
            assert moved[first:end].all() and not moved[:first].any()


def test_beams_of_a_batch_equal_its_rows_alone(vora):
    rows = [*text(3), (1, 2, 0), (2, 1, 1), *text(2, 1)], [*text(2), (2, 2, 2), *text(3, 1)]
    together = generate(vora, merged_prompt(*rows), num_beams=2)
    for row, answer in zip(rows, together):
        assert torch.equal(generate(vora, merged_prompt(row), num_beams=2)[0], answer)


def test_a_wrong_number_of_tokens_names_both_counts(vora):
    inputs = merged_prompt([(1, 2, 0), 20])
    inputs["image_grid_thw"][0, 1] *= 2
    with pytest.raises(
        ValueError, match="2 image tokens but the 1 images given have 16 patches, which make 4 at patch_merge 2"
    ):
        vora(**inputs)


def test_saves_and_loads_exactly(vora, tmp_path):
    inputs = merged_prompt([*text(3), (2, 2, 0), *text(2, 1)])
    vora.save_pretrained(tmp_path)
    loaded = VoraForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.patch_merge == MERGE
    assert torch.equal(loaded(**inputs).logits, vora(**inputs).logits)


@pytest.mark.parametrize("size", [(12, 12), (40, 9), (3, 60), (1, 1)])
def test_the_processor_makes_as_many_tokens_as_the_model_expects(llm_folder, size):
    processor = VoraProcessor.from_llm(llm_folder, min_image_tokens=1, max_image_tokens=6, **SIZES)
    model = VoraForConditionalGeneration.from_llm(llm_folder, **SIZES)
    content = [{"type": "image", "image": Image.new("RGB", size, "red")}, {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "red"}]
    inputs = processor.apply_chat_template(messages[:1], tokenize=True, return_dict=True, return_tensors="pt")
    sample = processor.training_sample(messages)
    for made in (inputs, sample):
        rows, columns = made["image_grid_thw"][0, 1:].tolist()
        assert rows % MERGE == columns % MERGE == 0
        count = (made["input_ids"] == processor.image_token_id).sum()
        assert count == rows * columns // MERGE**2 <= 6
        assert len(made["pixel_values"]) == rows * columns
    (planned,) = processor._get_num_multimodal_tokens([size[::-1]])["num_image_tokens"]
    assert planned == count
    model(**inputs)


def test_a_head_learns_the_mean_feature_of_the_patches_of_its_token():
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    vit = ViTModel(ViTConfig(**shape, image_size=PATCH * 4, patch_size=PATCH), add_pooling_layer=False)
    student = VoraForConditionalGeneration.from_llm(tiny_llm("llama"), image_token_id=IMAGE, **SIZES)
    distillation = BlockwiseDistillation([(0, 0)], 32, 8, center=False)
    learner = Objective(student, VoraImageProcessor(patch_size=PATCH), Teacher(vit), distillation)
    inputs = merged_prompt([(2, 2, 0), 20])
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    (taught,) = learner.teach(**images).values()
    (raster,) = Teacher(vit)([_image_of(inputs["pixel_values"])], [(4, 4)], [0]).values()
    torch.testing.assert_close(taught[1], raster[[2, 3, 6, 7]].mean(0))  # token 1: the upper right square
    losses = learner(torch.full_like(inputs["input_ids"], -100), **inputs)
    states = distillation.heads["0"](states_of_blocks(student, **inputs)[0][0, :4])
    expected = 1 - torch.cosine_similarity(states, taught, dim=-1).mean()
    torch.testing.assert_close(losses["distill_loss"], expected)


def _image_of(patches):
    rows = patches.view(4, 4, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4)
    return rows.reshape(3, 4 * PATCH, 4 * PATCH) * 0.5 + 0.5
