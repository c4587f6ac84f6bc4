"""Recipes are strict: what is misspelt or missing is named, with the nearest known key."""

from pathlib import Path

import pytest
import yaml

from vora.train.recipe import GONE_KEYS, OLD_KEYS, load_recipe, save_recipe
from vora.train.recipe_sections import Recipe, Section

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


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{save_strategy: no, logging_strategy: steps}", {"save_strategy": "no", "logging_strategy": "steps"}),
        ("{bf16: yes, tf32: off, fsdp: on}", {"bf16": True, "tf32": False, "fsdp": True}),
        ("{lr_scheduler_kwargs: {min_lr: 1e-5, warm: no}}", {"lr_scheduler_kwargs": {"min_lr": 1e-5, "warm": False}}),
        ("{learning_rate: 1e-4, max_steps: 1e4, save_steps: 1e-1}",
         {"learning_rate": 1e-4, "max_steps": 10_000, "save_steps": 0.1}),
        ("{run_name: 2026-11-28, seed: 1_000}", {"run_name": "2026-11-28", "seed": 1000}),
    ],
)  # fmt: skip
def test_scalars_mean_what_yaml_1_2_says(tmp_path, text, wanted):
    path = tmp_path / "r.yaml"
    path.write_text(
        f"{{model: {{llm: x}}, data: {{sources: [{{path: a, subset: no, split: off}}]}}, training: {text}}}"
    )
    recipe = load_recipe(path, ["data.sources.0.path=*.parquet"])
    assert recipe.training == wanted
    assert [type(value) for value in recipe.training.values()] == [type(value) for value in wanted.values()]
    source = recipe.data.sources[0]
    assert (source.subset, source.split) == ("no", "off") and source.path.endswith("*.parquet")
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe
    with pytest.raises(ValueError, match="subset.*write '2017' in quotes"):
        load_recipe(path, ["data.sources.0.subset=2017"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {llm: x}\ndata: {folder: a}\nstage: pretrain\ndata: {folder: b}\n", "data .* line 2 and in line 4"),
        ("model: {llm: x}\nlora:\n  rank: 1\n  num_blocks: 2\n  rank: 3\n", "rank .* line 3 and in line 5"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_both_lines(tmp_path, text, message):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"r.yaml: the key {message}"):
        load_recipe(tmp_path / "r.yaml")


def test_a_key_beside_what_an_anchor_brings_is_there_once(tmp_path):
    text = "model: {llm: x}\nlora: &a {rank: 4}\ndata: {sources: [{path: a, columns: {<<: {x: y}, x: z}}]}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert load_recipe(tmp_path / "r.yaml").data.sources[0].columns == {"x": "z"}


@pytest.mark.parametrize("as_override", [False, True])
@pytest.mark.parametrize("old", [*OLD_KEYS, *GONE_KEYS])
def test_an_old_key_names_the_new_one(tmp_path, old, as_override):
    values = {**GOOD, "teacher": {"name": "vit"}, "lora": {}, "data": {"sources": [{"path": "x"}]}}
    section, _, key = old.rpartition(".")
    if not as_override:
        (values[section] if section else values)[key] = 1
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    wanted = f"{old} is called {OLD_KEYS[old]} now: rename it" if old in OLD_KEYS else f"{old} is gone"
    with pytest.raises(ValueError, match=wanted):
        load_recipe(tmp_path / "r.yaml", [f"{old}=1"] * as_override)
    if section == "teacher":
        with pytest.raises(ValueError, match=wanted):
            load_recipe({**values, "teacher": None}, [f"{old}=1"])


def test_every_key_is_described():
    def sections(kind):
        yield kind
        for field in kind.model_fields.values():
            for one in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if isinstance(one, type) and issubclass(one, Section):
                    yield from sections(one)

    kinds = set(sections(Recipe))
    assert len(kinds) == 9 and all(kind.__doc__ for kind in kinds)
    assert not [(kind, name) for kind in kinds for name, field in kind.model_fields.items() if not field.description]
    new = {f"{kind.__name__}.{name}" for kind in kinds for name in kind.model_fields}
    assert {"LoraSection.text_kl_weight", "TeacherSection.vision_lr_scale", "DataSection.text_only"} <= new


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
