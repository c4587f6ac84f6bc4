"""Recipes are found by path or by name, in a checkout and in an installed package."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from vora.build.vit_init import vit_embedding
from vora.cli.options import names_of_recipes, names_of_specifications
from vora.export.carrier import SQUARE
from vora.train import packaged
from vora.train.packaged import find_recipe, packaged_recipes, recipes_folder
from vora.train.plan.meta_model import vit_config_of
from vora.train.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def test_a_recipe_has_a_name_and_a_path_that_exists_goes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    packaged_file = recipes_folder() / "smollm2-135m" / "pretrain.yaml"
    for name in ("smollm2-135m/pretrain", "smollm2-135m/pretrain.yaml", "recipes/smollm2-135m/pretrain.yaml"):
        assert find_recipe(name) == packaged_file
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "pretrain").write_text("{model: {llm: mine}, data: {sources: [{path: a}]}}")
    assert load_recipe("smollm2-135m/pretrain").model.llm == "mine"
    assert load_recipe("smollm2-135m/finetune").stage == "finetune"
    assert len(packaged_recipes()) == len(list((ROOT / "recipes").rglob("*.yaml")))


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("smollm2-135m/pretrian", "near names are smollm2-135m/pretrain"),
        ("easy-vqa/mask", "near names are easy-vqa/ablations/mask"),
        ("smollm2-135m", "say which of .*smollm2-135m/pretrain"),
        ("nothing like it at all", "`vora init` writes one"),
    ],
)
def test_an_unknown_name_lists_near_ones(name, wanted):
    with pytest.raises(ValueError, match=wanted):
        load_recipe(name)


def test_recipes_travel_in_the_wheel(tmp_path, monkeypatch):
    assert re.search(r'wheel\.force-include\]\n"recipes" = "vora/recipes"', (ROOT / "pyproject.toml").read_text())
    package = tmp_path / "site-packages" / "vora"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "one.yaml").write_text("")
    monkeypatch.setattr(packaged, "PACKAGE", package)
    assert packaged_recipes() == ["one"] and find_recipe("one") == package / "recipes" / "one.yaml"


def test_a_recipe_names_files_of_the_package_wherever_it_lies(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "recipes" / "easy-vqa" / "ablations" / "base.yaml").read_text())
    read = load_recipe(recipe)
    assert Path(read.teacher.name, "config.json").exists() and "{%" in read.model.chat_template
    assert load_recipe(recipe, ["teacher.name=vora/no-such-vit"]).teacher.name == "vora/no-such-vit"  # a hub id


def test_the_shell_completes_names():
    assert names_of_recipes("smollm2-135m/pre") == ["smollm2-135m/pretrain"]
    assert "easy-vqa/ablations/mask" in names_of_specifications("easy")
    assert not [name for name in names_of_specifications("") if name.endswith(("base", "pretrain"))]


def test_recipes_train_what_llama_cpp_writes_around_images():
    """All that begin with an LLM, but those of figures in the log, and those of teachers whose norm it lacks."""
    comparable = {"smollm2-135m/distill", "smollm2-135m/distill_long", "smollm2-135m/ablations/base",
                  "easy-vqa/ablations/base", "vora-7b/pretrain"}  # fmt: skip
    found = {}
    for name in sorted({*packaged_recipes()} - {*names_of_specifications("")} - comparable):
        recipe = load_recipe(name)
        if recipe.model.llm and recipe.model.encoder is None and not recipe.data.text_only:
            with torch.device("meta"):
                has_norm = (
                    vit_embedding(AutoModel.from_config(vit_config_of(recipe.teacher.name, name))).norm is not None
                )
            assert recipe.model.image_markers == (None if has_norm else SQUARE.image_markers), name
            found[name] = has_norm
    assert len(found) == 6 and found["smollm2-135m/pretrain"] is False and found["qwen3-1.7b/pretrain"] is True
    assert load_recipe(ROOT / "src/vora/quickstart/recipe.yaml").model.image_markers == SQUARE.image_markers
