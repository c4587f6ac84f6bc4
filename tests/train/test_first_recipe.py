"""`vora init` writes a recipe that fits the LLM, the data and the machine."""

import json
import re

import pytest
from PIL import Image
from tiny_teachers import tiny_vit

from vora.export.carrier import SQUARE
from vora.train.first_recipe import look_at, size_of, sizes_of, sources_text, write_recipe
from vora.train.plan.meta_model import config_of
from vora.train.recipe import load_recipe


def write_rows(folder, *names, count=6):
    """A file of rows with these columns, the first of which names an image."""
    Image.new("RGB", (64, 32)).save(folder / "a.png")
    row = {name: "a.png" if number == 0 else f"some {name}" for number, name in enumerate(names)}
    (folder / "rows.jsonl").write_text((json.dumps(row) + "\n") * count)
    return str(folder / "rows.jsonl")


@pytest.mark.parametrize(
    ("llm", "size", "rank"),
    [("smollm2-135m", 134_515_008, 138), ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120, 230),
     ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400, 547), ("Qwen/Qwen3-1.7B", 1_720_574_976, 512)],
)  # fmt: skip
def test_rank_is_that_of_the_packaged_recipes(llm, size, rank):
    assert size_of(config_of(llm)) == (size, rank)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("image", "question", "answer"), {}),
        (("img", "query", "response"), {"image": "img", "question": "query", "answer": "response"}),
        (("photo", "description"), {"image": "photo", "caption": "description"}),
        (("file", "description"), {"image": "file", "caption": "description"}),
    ],
)
def test_columns_are_found(tmp_path, names, columns):
    found = look_at(write_rows(tmp_path, *names))
    assert found.columns == columns and found.num_rows == 6 and set(found.pixels) == {(64, 32)}


def test_columns_that_say_nothing_are_named(tmp_path):
    with pytest.raises(ValueError, match="fit no layout.*--column image=photo"):
        look_at(write_rows(tmp_path, "x", "y"))
    named = {"image": "x", "caption": "y"}
    assert look_at(write_rows(tmp_path, "x", "y"), named).columns == named


def test_a_folder_of_images_is_found_or_named_and_written(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    rows = write_rows(tmp_path, "file", "caption")
    (tmp_path / "a.png").rename(tmp_path / "photos" / "a.png")
    found = look_at(rows)
    assert (found.image_folder, found.columns) == (str(tmp_path / "photos"), {"image": "file"})
    assert "image_folder: " + str(tmp_path / "photos") in sources_text([found])
    (tmp_path / "far" / "off").mkdir(parents=True)
    (tmp_path / "photos" / "a.png").rename(tmp_path / "far" / "off" / "a.png")
    with pytest.raises(ValueError, match="none of the first 6 images can be read, such as .*--image-folder"):
        look_at(rows, {"image": "file"})
    assert look_at(rows, {"image": "file"}, str(tmp_path / "far" / "off")).pixels


def test_sizes_follow_from_the_images(tmp_path):
    small = sizes_of([look_at(write_rows(tmp_path, "image", "caption"))], 8, 2048)
    assert (small["max_image_tokens"], small["patch_merge"], small["sequence_length"]) == (32, 1, 512)
    without = sizes_of([look_at(write_rows(tmp_path, "image", "caption"))], 8, 2048, 0)
    assert small["mean_tokens"] - without["mean_tokens"] == 14  # of the texts around the image
    assert sizes_of([], 14, 256)["sequence_length"] == 256  # the LLM's context


def test_models_that_cannot_be_had_are_told_of(tmp_path, llm_folder, teacher_folder):
    """Offline: the teacher that fits is asked for, one that was named is taken and told of."""
    path = tmp_path / "mine.yaml"
    with pytest.raises(ValueError, match="facebook/dinov2-small, which fits, cannot be had.*Give --teacher a folder"):
        write_recipe(path, llm_folder, [], None, 2.0)
    assert not path.exists()
    lines = write_recipe(path, "Qwen/Qwen3-1.7B", [], "facebook/dinov2-small", 2.0)
    assert [line.split(" cannot be had here: ")[0] for line in lines if "cannot be had here" in line] == [
        "Qwen/Qwen3-1.7B", "facebook/dinov2-small"]  # fmt: skip
    (tmp_path / "other").mkdir()
    lines = write_recipe(tmp_path / "other.yaml", llm_folder, [], teacher_folder, 2.0)
    assert not any("cannot be had" in line for line in lines)


def test_texts_of_llama_cpp_are_written_where_it_can_read_the_images(tmp_path, llm_folder, teacher_folder):
    write_recipe(tmp_path / "one.yaml", llm_folder, [], teacher_folder, 2.0)
    assert load_recipe(tmp_path / "one.yaml").model.image_markers == SQUARE.image_markers
    tiny_vit("aimv2_vision_model").save_pretrained(tmp_path / "aimv2")
    write_recipe(tmp_path / "other.yaml", llm_folder, [], str(tmp_path / "aimv2"), 2.0)
    assert load_recipe(tmp_path / "other.yaml").model.image_markers is None
    assert "patch_norm" in (tmp_path / "other.yaml").read_text()


def test_the_recipe_loads_and_names_what_was_found(tmp_path, llm_folder, teacher_folder, monkeypatch):
    precision = {"model.dtype": "float32", "training.bf16": False, "training.use_cpu": True}
    monkeypatch.setattr("vora.train.first_recipe.precision_overrides", lambda: precision)
    data, path = write_rows(tmp_path, "img", "question", "answer"), tmp_path / "new" / "mine.yaml"
    lines = write_recipe(path, llm_folder, [data], teacher_folder, 2.0)
    assert any("6 rows" in line and "img as image" in line for line in lines)
    recipe = load_recipe(path)
    assert (recipe.model.llm, recipe.teacher.name) == (llm_folder, teacher_folder)
    assert recipe.data.sources[0].path == data and recipe.data.sources[0].columns == {"image": "img"}
    assert recipe.data.sequence_length == 256 and recipe.lora.num_blocks == 2 and not recipe.teacher.spread
    assert recipe.training["use_cpu"] and recipe.training["max_steps"] == 20
    mean_tokens = int(re.search(r"some (\d+) tokens a sample", path.read_text())[1])
    passes = 19 * 8 * 256 / (6 * mean_tokens)  # 20 steps are the fewest
    assert any(f"{passes:.3g} times through the data, not 2" in line for line in lines)
    assert recipe.training["learning_rate"] == 1e-3 and recipe.learning_rates.lora_b == 4e-3  # of a small LLM
    assert "# 6 rows" in path.read_text() and f"some {passes:.3g} times through the data" in path.read_text()
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": "a red thing"}) + "\n")
    assert (
        "Warning: none of the first rows has an image"
        in write_recipe(tmp_path / "blind.yaml", llm_folder, [str(texts)], teacher_folder, 2.0)[-1]
    )
    assert not any("Warning" in line for line in lines)
    monkeypatch.setattr("vora.train.first_recipe.LENGTHS", (1024,))  # near which the best is looked for at the start
    write_recipe(tmp_path / "auto.yaml", "smollm2-135m", [data], teacher_folder, 2.0)
    assert "sequence_length: auto" in (tmp_path / "auto.yaml").read_text()
    with pytest.raises(ValueError, match="is there already"):
        write_recipe(path, llm_folder, [data], teacher_folder, 2.0)
