"""Recipes are strict: what is misspelt or missing, or would come to nothing, is named before any work."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import TrainingArguments

from vora.train.from_recipe import check_fsdp, check_recipe
from vora.train.recipe import OLD_KEYS, load_recipe, save_recipe
from vora.train.recipe_sections import AUTO_LENGTH, Recipe
from vora.train.run import train
from vora.train.sharding import check_sharding

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
        ({"training": {"max_steps": "x"}}, "training.max_steps is 'x': give a whole number"),
        ({"training": {"learning_rate": "1e-4"}}, "training.learning_rate is '1e-4': give a number"),
        ({"training": {"bf16": "maybe"}}, "training.bf16 is 'maybe': give true or false"),
        ({"training": {"lr_scheduler_type": "cosin"}}, "did you mean cosine or cosine_with"),
        ({"training": {"optim": "adam"}}, "did you mean adamw_torch or"),
        ({"training": {"save_strategy": False}}, "known: best, epoch, no, steps"),
        ({"training": {"save_steps": 0}}, "training.save_steps is 0: give more than 0"),
        (
            {"training": {"per_device_train_batch_size": 0, "weight_decay": -1}},
            "at least 1; training.weight_decay is -1",
        ),
        ({"training": {"adam_beta2": 1.0}}, "give less than 1"),
        ({"model": {"llm": "x", "image_markers": ["it's", ">"]}}, "give two texts without quotes"),
    ],
)
def test_mistakes_are_named(sections, wanted):
    with pytest.raises(ValueError) as error:
        load_recipe({**GOOD, **sections})
    assert wanted in str(error.value) and "\n" not in str(error.value)


def test_sources_are_added_on_the_command_line_and_a_length_may_be_found(file):
    added = load_recipe(file, ["data.sources.+=more.csv", "data.sources.+={path: x, max_samples: 3}"]).data.sources
    assert [(one.path, one.max_samples) for one in added[-2:]] == [("more.csv", None), ("x", 3)] and len(added) >= 3
    assert load_recipe(file, ["data.sources=[only.tsv]"]).data.sources[0].path == "only.tsv"
    assert load_recipe(file, ["data.sequence_length=auto"]).data.sequence_length == AUTO_LENGTH
    for wrong in ("7", "many"):
        with pytest.raises(ValueError, match="data.sequence_length"):
            load_recipe(file, [f"data.sequence_length={wrong}"])


def test_overrides_reach_nested_keys_and_are_checked(file):
    recipe = load_recipe(file, ["training.learning_rate=1e-3", "lora.rank=4", "teacher.name=folder"])
    assert recipe.training["learning_rate"] == 1e-3 and recipe.lora.rank == 4 and recipe.teacher.name == "folder"
    plain = load_recipe(file, ["data.sources.0.split=test"])
    assert plain.data.sources[0].split == "test" and plain.lora.rank == 32 and plain.teacher is None
    assert plain.stage == "pretrain" and not plain.recomputed_blocks  # by default
    save_recipe(plain, file)  # a run's own, in which what was left out is null
    shared = load_recipe(file, ["data.validation.share=0.1", "teacher.name=folder"])
    assert shared.data.validation.share == 0.1 and shared.teacher.name == "folder"
    for key in ("gradient_checkpointing", "activation_checkpointing"):
        for value in (True, False, 0, 7):
            assert load_recipe({**GOOD, "training": {key: value}}).recomputed_blocks is value
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
        ("model: {llm: x}\ndata: {folder: a}\ndata: {folder: b}\n", "key data .* line 2 and in line 3"),
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
@pytest.mark.parametrize("old", [old for old in OLD_KEYS if not old.startswith("evaluate.")])
def test_an_old_key_names_the_new_one(old, as_override):
    values = {**GOOD, "teacher": {"name": "vit"}, "lora": {}, "data": {"sources": [{"path": "x"}]}}
    section, _, key = old.rpartition(".")
    if as_override:
        values["teacher"] = None  # there is no place for it
    else:
        (values[section] if section else values)[key] = 1
    with pytest.raises(ValueError, match=f"{old} is called {OLD_KEYS[old]} now: rename it"):
        load_recipe(values, [f"{old}=1"] * as_override)


def test_every_key_is_described():
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    assert len(sections) == 10 and all(section["description"] for section in sections)
    assert all("description" in key for section in sections for key in section["properties"].values())


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


NOWHERE = {"model": {"llm": "none"}, "data": {"sources": [{"path": "none.jsonl"}]}, "training": {"max_steps": 1}}


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"training": {"use_liger_kernel": True}}, "in parts of bounded size"),
        ({"training": {"label_smoothing_factor": 0.1}}, "losses are those of vora.distill.Objective"),
        ({"training": {"auto_find_batch_size": True}}, "sequences are packed before a batch is tried"),
        ({"training": {"save_only_model": True}}, "from which nothing can resume"),
        ({"training": {"data_seed": 3}}, "order of the data follows training.seed"),
        ({"training": {"neftune_noise_alpha": 5}}, "neftune_noise_alpha is not supported"),
        ({"training": {"eval_strategy": "steps"}}, "no samples to evaluate on: hold some out with data.validation"),
        ({"training": {"load_best_model_at_end": True}}, "no samples to evaluate on"),
        ({"teacher": {"name": "vit", "weight": 0, "distill_only_steps": 9}}, "distill_only_steps is 9"),
        ({"stage": "finetune", "teacher": {"name": "vit"}}, "set teacher=null"),
        (
            {"stage": "finetune", "model": {"vora": "v", "dtype": "bfloat16"}},
            "updates .* round to nothing: set model.dt",
        ),
        ({"training": {"dataloader_drop_last": True}}, "vora's own loader"),
        ({"training": {"do_eval": True}}, "`vora eval` asks"),
        ({"training": {"bf16": True}}, "training.bf16 is true, but there is no GPU here: set training.use_cpu=true"),
        ({"training": {"fp16": True}}, "training.fp16 is true, but there is no GPU"),
        ({"training": {"tf32": True}}, "training.tf32 is true, but no GPU"),
        ({"training": {"report_to": "clearml"}}, "clearml, which is not installed: pip install clearml"),
        ({"training": {"optim": "galore_adamw", "optim_target_modules": ["a"]}}, "training.optim .*galore"),
        (
            {"training": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min": 1}}},
            "lr_scheduler_kwargs .*min",
        ),
        ("several GPUs", "sees 2 GPUs.*nproc_per_node 2"),
    ],
)
def test_what_would_come_to_nothing_is_refused_of_a_run(sections, wanted, tmp_path, monkeypatch):
    if sections == "several GPUs":
        monkeypatch.setattr(TrainingArguments, "n_gpu", 2)
        sections = {}
    sections = {**NOWHERE, **sections, "training": NOWHERE["training"] | sections.get("training", {})}
    recipe = load_recipe(sections)
    with pytest.raises(ValueError, match=wanted):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"text_kl_weight": 1.0}}, "lora.text_kl_weight runs the LLM once more"),
        ({"sample_generations": [{"image": "a", "question": "b"}]}, "sample_generations are made in one"),
    ],
)
def test_what_spread_weights_cannot_do_is_refused(sections, message, tmp_path, monkeypatch):
    recipe = load_recipe({**NOWHERE, **sections})
    arguments = SimpleNamespace(n_gpu=1, fsdp=["full_shard"], fsdp_config=None, world_size=2)
    monkeypatch.setattr("vora.train.run.check_libraries", lambda arguments: None)
    check_fsdp(recipe, are_spread=False)
    check_fsdp(load_recipe(dict(NOWHERE)), are_spread=True)
    monkeypatch.setattr("vora.train.run.training_arguments", lambda recipe, directory: arguments)
    with pytest.raises(ValueError, match=f"{message}.*Train with DDP"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("num", "values", "message"),
    [
        (1, {"fsdp": True}, "there is one: start several with `torchrun"),
        (2, {"fsdp": True, "fsdp_config": {"version": 1}}, "training.fsdp is FSDP2, by decoder block"),
        (2, {"fsdp": True, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}}, "by decoder block"),
        (2, {"fsdp": True, "fsdp_config": {"cpu_offload": True}}, "cpu_offload is not supported"),
        (2, {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}, "state_dict_type is not supp"),
        (2, {"fsdp": "full_shard offload"}, "cpu_offload is not supported"),
        (2, {"fsdp_config": {"reshard_after_forward": False}}, "changes nothing without training.fsdp"),
    ],
)
def test_fsdp_does_what_it_says_or_is_refused(num, values, message, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)
    of_all = SimpleNamespace(world_size=num, fsdp=arguments.fsdp, fsdp_config=arguments.fsdp_config)
    with pytest.raises(ValueError, match=message):
        check_sharding(of_all)


@pytest.mark.parametrize("values", [{}, {"fsdp": True}, {"fsdp": "shard_grad_op auto_wrap"}])
def test_fsdp_that_is_done_is_taken(values, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **values)
    check_sharding(SimpleNamespace(world_size=2, fsdp=arguments.fsdp, fsdp_config=arguments.fsdp_config))


def test_weights_in_float16_are_not_trained_in_bfloat16(recipe):
    mixed = recipe(max_steps=1, bf16=True, use_cpu=True)
    mixed.model.dtype = "float16"
    with pytest.raises(ValueError, match="model.dtype=bfloat16"):
        check_recipe(mixed)
