"""Images of any size in stock llama.cpp: positions of rows and columns, and texts around images."""

import gguf
import numpy as np
import pytest
import torch
from exportable import TOKEN, save_exportable, tiny_exportable
from PIL import Image
from test_verify import needs_llama_cpp

from vora.export.carrier import ANY_SIZE, SQUARE, fitting_carrier, token_positions, token_tables, write_mmproj
from vora.export.export_info import read_export_info
from vora.export.gguf_files import GgufExport, export_gguf, planned
from vora.export.prompts import in_whole_tokens, make_prompt, swap_far_patches, with_image_markers
from vora.export.verify import verify

ANY = {"axial_positions": True, "image_markers": ANY_SIZE.image_markers}
SIZES = ((3, 3), (2, 5), (6, 1), (1, 1))  # rows and columns of tokens


def test_a_carrier_is_chosen_by_what_a_model_was_trained_with():
    assert fitting_carrier(*tiny_exportable(**ANY)) == ANY_SIZE
    assert fitting_carrier(*tiny_exportable(**ANY | {"axial_positions": False})) == SQUARE
    assert fitting_carrier(*tiny_exportable(axial_positions=True)) == SQUARE
    assert fitting_carrier(*tiny_exportable(**ANY | {"image_markers": SQUARE.image_markers})) == SQUARE


def test_an_llm_whose_images_llama_cpp_would_read_causally_has_one_size():
    model, processor = tiny_exportable(**ANY)
    model.config.get_text_config().hidden_size = 1536
    assert fitting_carrier(model, processor) == SQUARE


def test_tables_add_up_to_the_positions_of_any_grid():
    embedding = tiny_exportable(**ANY)[0].model.patch_embedding
    columns, rows = token_tables(embedding, 7)
    for grid in SIZES:
        found = rows[: grid[0], None] + columns[None, : grid[1]]
        torch.testing.assert_close(found, token_positions(embedding, *grid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grid", SIZES)
def test_mmproj_computes_what_the_patch_embedding_does(tmp_path, grid):
    """By the steps of llama.cpp's clip_graph_gemma4v."""
    model, processor = tiny_exportable(**ANY)
    processor.image_processor.set_budget(1, 10)
    write_mmproj(tmp_path / "mmproj.gguf", model, processor.image_processor, "tiny")
    reader = gguf.GGUFReader(tmp_path / "mmproj.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in reader.tensors}
    pixels = np.random.default_rng(0).integers(0, 256, (grid[0] * TOKEN, grid[1] * TOKEN, 3), dtype=np.uint8)
    image = torch.tensor((pixels / 255 - values["clip.vision.image_mean"]) / values["clip.vision.image_std"])
    image = 2 * image.permute(2, 0, 1).float() - 1
    states = torch.nn.functional.conv2d(image[None], tensors["v.patch_embd.weight"], stride=TOKEN)[0].flatten(1).T
    x, y = torch.arange(grid[1]).repeat(grid[0]), torch.arange(grid[0]).repeat_interleave(grid[1])
    states = states + tensors["v.position_embd.weight"][0, x] + tensors["v.position_embd.weight"][1, y]
    states = states * states.shape[1] ** 0.5
    eps = values["clip.vision.attention.layer_norm_epsilon"]
    states = states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()
    with torch.no_grad():
        wanted = model.model.patch_embedding(**processor.image_processor(pixels, return_tensors="pt"))
    torch.testing.assert_close(states @ tensors["mm.input_projection.weight"].T, wanted, atol=1e-4, rtol=1e-4)
    assert values["clip.projector_type"] == "gemma4v" and values["clip.vision.patch_size"] == TOKEN
    assert tensors["v.position_embd.weight"].shape[1] == 512  # as many as llama-server takes at once


def test_one_size_cannot_be_asked_for(tmp_path):
    with pytest.raises(ValueError, match="--image-size 16: the model is exported for images of any size"):
        planned(*tiny_exportable(**ANY), tmp_path, "tiny", "f32", 16)


def test_a_prompt_has_the_texts_around_its_image_as_tokens_by_themselves():
    processor, image = tiny_exportable()[1], Image.new("RGB", (24, 16))
    shown = with_image_markers(processor, ("<|image>", "<image|>"))
    plain, marked = (make_prompt(one, image, "> what?") for one in (processor, shown))
    begin, end = (processor.ids_of(text) for text in ANY_SIZE.image_markers)
    first, length = plain.first_image_token, 6
    ids, found = plain.inputs["input_ids"][0].tolist(), marked.inputs["input_ids"][0].tolist()
    assert found == ids[:first] + begin + ids[first : first + length] + end + ids[first + length :]
    assert processor.image_markers == ["", ""]


def test_images_keep_their_aspect_ratio_in_whole_tokens():
    processor = tiny_exportable(**ANY)[1]
    assert in_whole_tokens(processor, Image.new("RGB", (300, 100))).size == (4 * TOKEN, 2 * TOKEN)
    assert in_whole_tokens(processor, Image.new("RGB", (17, 23))).size == (2 * TOKEN, 3 * TOKEN)
    assert swap_far_patches(Image.new("RGB", (TOKEN, 2 * TOKEN)), TOKEN) is None


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_llama_cpp_computes_the_same_at_several_aspect_ratios(tmp_path, family):
    folder = save_exportable(tmp_path / "model", family, **ANY)
    export = export_gguf(folder, tmp_path / "out", quant="f16")
    assert (
        read_export_info(tmp_path / "out", GgufExport) == export and export.image_size is None and export.knows_markers
    )
    assert "--image-min-tokens 4 --image-max-tokens 9" in export.summary() and "around each" not in export.summary()
    paths = []
    for number, size in enumerate(((24, 24), (32, 16), (16, 32), (24, 8), (8, 8))):  # the last grows, for 4 tokens
        colours = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(colours).save(paths[-1])
    found = verify(folder, "llama.cpp", images=paths, files=tmp_path / "out", max_new_tokens=8)
    assert not found.failures and found.max_abs_diff < 0.05 and found.argmax_agreement == 1
    assert found.num_prompt_tokens == found.num_prompt_tokens_runtime and found.image_attention == "bidirectional"
