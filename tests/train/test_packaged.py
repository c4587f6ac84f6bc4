"""Recipes are found by path or by name, in a checkout and in an installed package."""

import re
from pathlib import Path

import pytest

from vora.cli.options import names_of_recipes, names_of_specifications
from vora.train import packaged
from vora.train.packaged import find_recipe, packaged_recipes, recipes_folder
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
