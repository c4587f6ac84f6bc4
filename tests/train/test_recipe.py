"""Recipes are strict: what is misspelt or missing is named, with the nearest known key."""

from pathlib import Path

import pytest
import yaml

from vora.train.recipe import load_recipe
from vora.train.run import train

GOOD = {"model": {"llm": "smollm2-135m"}, "data": {"sources": [{"path": "easy-vqa"}]}}
ROOT = Path(__file__).resolve().parents[2]


def with_values(**sections):
    return {**GOOD, **sections}


def test_defaults_fill_what_is_left_out():
    recipe = load_recipe(dict(GOOD))
    assert recipe.stage == "pretrain" and recipe.lora.rank == 32 and recipe.teacher is None


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (with_values(lora={"rnak": 8}), "unknown key lora.rnak (did you mean rank?)"),
        (with_values(trainning={}), "unknown key trainning (did you mean training?)"),
        (with_values(training={"learning_rte": 1}), "training.learning_rte is not a field of TrainingArguments"),
        (with_values(data={"sources": [{"path": "x", "spilt": "train"}]}), "0.spilt (did you mean split?)"),
        (with_values(data={"sources": []}), "data.sources"),
        (with_values(model={}), "exactly one of llm"),
        (with_values(lora={"rank": 0}), "lora.rank"),
        (with_values(stage="pretraining"), "stage"),
        (with_values(training={"gradient_checkpointing": "first 3"}), "give true (every block), false, or n"),
        (with_values(training={"activation_checkpointing": -1}), "give true (every block), false, or n"),
        (with_values(training={"gradient_checkpointing": 1, "activation_checkpointing": 2}), "are one thing"),
        (
            with_values(
                training={"gradient_checkpointing": 1, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}
            ),
            "to a number n",
        ),
    ],
)  # fmt: skip
def test_mistakes_are_named(values, wanted):
    with pytest.raises(ValueError) as error:
        load_recipe(values)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (with_values(training={"use_liger_kernel": True}), "in parts of bounded size"),
        (with_values(training={"label_smoothing_factor": 0.1}), "losses are the learner's own"),
        (with_values(training={"auto_find_batch_size": True}), "rows are packed before a batch is tried"),
        (with_values(training={"save_only_model": True}), "from which nothing can resume"),
        (with_values(training={"data_seed": 3}), "order of the data follows training.seed"),
        (
            with_values(teacher={"name": "vit", "weight": 0, "distill_only_steps": 9}),
            "distill_only_steps is 9",
        ),
        (with_values(stage="finetune", teacher={"name": "vit"}), "set teacher=null"),
    ],
)
def test_what_would_come_to_nothing_is_refused_of_a_run_and_read_of_an_old_one(values, wanted, tmp_path):
    recipe = load_recipe(values)
    with pytest.raises(ValueError, match=wanted):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_blocks_to_be_computed_again_have_one_key_by_either_name(key):
    for value in (True, False, 0, 7):
        assert load_recipe(with_values(training={key: value})).recomputed_blocks is value
    assert not load_recipe(dict(GOOD)).recomputed_blocks


def test_overrides_reach_nested_keys_and_are_checked(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"stage": "pretrain", **GOOD}))
    recipe = load_recipe(path, ["training.learning_rate=1e-3", "lora.rank=4", "teacher.name=folder"])
    assert recipe.training["learning_rate"] == 1e-3 and recipe.lora.rank == 4 and recipe.teacher.name == "folder"
    assert load_recipe(path, ["data.sources.0.split=test"]).data.sources[0].split == "test"
    for nowhere in ("data.sources.7.path=x", "data.sources.first.path=x", "stage.name=x"):
        with pytest.raises(ValueError, match="names no place"):
            load_recipe(path, [nowhere])
    with pytest.raises(ValueError, match="did you mean rank"):
        load_recipe(path, ["lora.rang=4"])
    with pytest.raises(ValueError, match="write key=value"):
        load_recipe(path, ["lora.rank"])


@pytest.mark.parametrize("text", ["a: [", "just text", ""])
def test_broken_files_are_refused_in_one_line(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        load_recipe(path)
    assert "r.yaml" in str(error.value) and "\n" not in str(error.value)


def test_missing_file_is_refused():
    with pytest.raises(ValueError, match="Cannot read recipe"):
        load_recipe("no-such-recipe.yaml")


RECIPES = [  # but for the specifications of ablations, which tests/test_ablate.py loads
    path
    for path in sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("src/**/recipe.yaml")])
    if path.parent.name != "ablations" or path.stem == "base"
]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_of_the_repository_loads(path):
    assert load_recipe(path).training["max_steps"] > 0


def test_sources_start_in_the_data_folder(tmp_path):
    recipe = {**GOOD, "data": {"folder": "images", "sources": [{"path": "a*.parquet"}, {"path": "/else/b.jsonl"}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "images").mkdir()
    paths = [source.path for source in load_recipe(tmp_path / "recipe.yaml").data.sources]
    assert paths == [str(tmp_path / "images" / "a*.parquet"), "/else/b.jsonl"]
    moved = load_recipe(tmp_path / "recipe.yaml", [f"data.folder={tmp_path}"])
    assert moved.data.sources[0].path == str(tmp_path / "a*.parquet")


def test_powers_of_ten_are_numbers_and_patterns_are_text(tmp_path):
    values = {"model": {"llm": "x"}, "data": {"sources": [{"path": "a.jsonl"}]}, "training": {"learning_rate": "1e-4"}}
    recipe = load_recipe(values, ["data.sources.0.path=*.parquet"])
    assert recipe.training["learning_rate"] == 1e-4 and recipe.data.sources[0].path.endswith("*.parquet")
    values["training"] = {"lr_scheduler_kwargs": {"min_lr": "1e-5"}, "max_steps": "1e4", "save_steps": "1e-1"}
    training = load_recipe(values).training
    assert training == {"lr_scheduler_kwargs": {"min_lr": 1e-5}, "max_steps": 10_000, "save_steps": 0.1}
    assert type(training["max_steps"]) is int


def test_a_pattern_is_sought_beside_the_recipe_and_then_here(tmp_path, monkeypatch):
    for place in ("recipes/there", "here"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_text("")
    (tmp_path / "recipes" / "recipe.yaml").write_text("{model: {llm: x}, data: {sources: [{path: there/*.jsonl}]}}")
    monkeypatch.chdir(tmp_path)
    beside = load_recipe(tmp_path / "recipes" / "recipe.yaml")
    assert beside.data.sources[0].path == str(tmp_path / "recipes" / "there" / "*.jsonl")
    here = load_recipe(tmp_path / "recipes" / "recipe.yaml", ["data.sources.0.path=here/*.jsonl"])
    assert here.data.sources[0].path == str(tmp_path / "here" / "*.jsonl")
    folder = load_recipe(tmp_path / "recipes" / "recipe.yaml", ["data.folder=there"])
    assert folder.data.folder == str(tmp_path / "recipes" / "there")  # where evaluations look too


def test_folders_beside_a_recipe_take_no_known_name(tmp_path):
    for name in ("smollm2-135m", "easy-vqa", "mine"):
        (tmp_path / name).mkdir()
    values = {"model": {"llm": "smollm2-135m"}, "data": {"sources": [{"path": "easy-vqa"}, {"path": "mine"}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert recipe.model.llm == "smollm2-135m" and recipe.data.sources[0].path == "easy-vqa"
    assert recipe.data.sources[1].path == str(tmp_path / "mine")
