"""Recipes are strict: what is misspelt or missing is named, with the nearest known key."""

from pathlib import Path

import pytest
import yaml

from vora.train.recipe import GONE_KEYS, OLD_KEYS, load_recipe, save_recipe
from vora.train.recipe_sections import Recipe, Section

GOOD = {"model": {"llm": "smollm2-135m"}, "data": {"sources": [{"path": "easy-vqa"}]}}
ROOT = Path(__file__).resolve().parents[2]
EVERY_N = {"gradient_checkpointing": 1, "gradient_checkpointing_kwargs": {"every_n_layers": 2}}


@pytest.fixture
def file(tmp_path):
    """A recipe's file, in a folder of its own."""
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({"stage": "pretrain", **GOOD}))
    return tmp_path / "r.yaml"


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"lora": {"rnak": 8}}, "unknown key lora.rnak (did you mean rank?)"),
        ({"trainning": {}}, "unknown key trainning (did you mean training?)"),
        ({"training": {"learning_rte": 1}}, "training.learning_rte is not a field of TrainingArguments"),
        ({"data": {"sources": [{"path": "x", "spilt": "train"}]}}, "0.spilt (did you mean split?)"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"model": {}}, "exactly one of llm"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"stage": "pretraining"}, "stage"),
        ({"training": {"gradient_checkpointing": "first 3"}}, "give true (every block), false, or n"),
        ({"training": {"activation_checkpointing": -1}}, "give true (every block), false, or n"),
        ({"training": {"gradient_checkpointing": 1, "activation_checkpointing": 2}}, "are one thing"),
        ({"training": EVERY_N}, "to a number n"),
    ],
)
def test_mistakes_are_named(sections, wanted):
    with pytest.raises(ValueError) as error:
        load_recipe({**GOOD, **sections})
    assert wanted in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["gradient_checkpointing", "activation_checkpointing"])
def test_blocks_to_be_computed_again_have_one_key_by_either_name(key):
    for value in (True, False, 0, 7):
        assert load_recipe({**GOOD, "training": {key: value}}).recomputed_blocks is value


def test_overrides_reach_nested_keys_and_are_checked(file):
    recipe = load_recipe(file, ["training.learning_rate=1e-3", "lora.rank=4", "teacher.name=folder"])
    assert recipe.training["learning_rate"] == 1e-3 and recipe.lora.rank == 4 and recipe.teacher.name == "folder"
    plain = load_recipe(file, ["data.sources.0.split=test"])
    assert plain.data.sources[0].split == "test" and plain.lora.rank == 32 and plain.teacher is None
    assert plain.stage == "pretrain" and not plain.recomputed_blocks  # by default
    for override, message in {
        "data.sources.7.path=x": "names no place",
        "data.sources.first.path=x": "names no place",
        "stage.name=x": "names no place",
        "lora.rang=4": "did you mean rank",
        "lora.rank": "write key=value",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_recipe(file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "r.yaml is no valid YAML"),
        ("just text", "r.yaml holds no keys"),
        ("", "r.yaml holds no keys"),
        (None, "Cannot read recipe .*r.yaml"),
        (
            "model: {llm: x}\ndata: {folder: a}\nstage: pretrain\ndata: {folder: b}\n",
            "key data .* line 2 and in line 4",
        ),
        ("model: {llm: x}\nlora:\n  rank: 1\n  num_blocks: 2\n  rank: 3\n", "key rank .* line 3 and in line 5"),
    ],
)
def test_broken_files_are_refused_in_one_line(file, text, message):
    if text is None:
        file.unlink()
    else:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(file)
    assert "\n" not in str(error.value)


RECIPES = [  # but for the specifications of ablations, which tests/test_ablate.py loads
    path
    for path in sorted([*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("src/**/recipe.yaml")])
    if path.parent.name != "ablations" or path.stem == "base"
]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_of_the_repository_loads(path):
    assert load_recipe(path).training["max_steps"] > 0


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
def test_scalars_mean_what_yaml_1_2_says(file, text, wanted):
    source = "{path: a, subset: no, split: off, columns: {<<: {x: y}, x: z}}"  # x is there once
    file.write_text(f"{{model: {{llm: x}}, data: {{sources: [{source}]}}, training: {text}}}")
    recipe = load_recipe(file, ["data.sources.0.path=*.parquet"])
    assert recipe.training == wanted
    assert [type(value) for value in recipe.training.values()] == [type(value) for value in wanted.values()]
    source = recipe.data.sources[0]
    assert (source.subset, source.split, source.columns) == ("no", "off", {"x": "z"})
    assert source.path.endswith("*.parquet")
    save_recipe(recipe, file.with_name("saved.yaml"))
    assert load_recipe(file.with_name("saved.yaml")) == recipe
    with pytest.raises(ValueError, match="subset.*write '2017' in quotes"):
        load_recipe(file, ["data.sources.0.subset=2017"])


@pytest.mark.parametrize("as_override", [False, True])
@pytest.mark.parametrize("old", [*OLD_KEYS, *GONE_KEYS])
def test_an_old_key_names_the_new_one(old, as_override):
    values = {**GOOD, "teacher": {"name": "vit"}, "lora": {}, "data": {"sources": [{"path": "x"}]}}
    section, _, key = old.rpartition(".")
    if as_override:
        values["teacher"] = None  # there is no place for it
    else:
        (values[section] if section else values)[key] = 1
    wanted = f"{old} is called {OLD_KEYS[old]} now: rename it" if old in OLD_KEYS else f"{old} is gone"
    with pytest.raises(ValueError, match=wanted):
        load_recipe(values, [f"{old}=1"] * as_override)


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


def test_sources_start_beside_the_recipe_in_its_data_folder_or_here(tmp_path, monkeypatch):
    for place in ("recipes/there", "here"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.jsonl").write_text("")
    (tmp_path / "recipes" / "r.yaml").write_text("{model: {llm: x}, data: {sources: [{path: there/*.jsonl}]}}")
    monkeypatch.chdir(tmp_path)

    def data(*overrides):
        return load_recipe(tmp_path / "recipes" / "r.yaml", overrides).data

    assert data().sources[0].path == str(tmp_path / "recipes" / "there" / "*.jsonl")
    assert data("data.sources.0.path=here/*.jsonl").sources[0].path == str(tmp_path / "here" / "*.jsonl")
    there = data("data.folder=there", "data.sources=[{path: a*.parquet}, {path: /else/b.jsonl}]")
    assert there.folder == str(tmp_path / "recipes" / "there")  # where evaluations look too
    assert [source.path for source in there.sources] == [f"{there.folder}/a*.parquet", "/else/b.jsonl"]
    assert data(f"data.folder={tmp_path}", "data.sources.0.path=a").sources[0].path == str(tmp_path / "a")


def test_folders_beside_a_recipe_take_no_known_name(file):
    for name in ("smollm2-135m", "easy-vqa", "mine"):
        file.with_name(name).mkdir()
    recipe = load_recipe(file, ["data.sources=[{path: easy-vqa}, {path: mine}]"])
    assert recipe.model.llm == "smollm2-135m"
    assert [source.path for source in recipe.data.sources] == ["easy-vqa", str(file.with_name("mine"))]
