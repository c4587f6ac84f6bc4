"""The recipe of a run: strict YAML, in which an unknown key is an error that names the nearest known one."""

import re
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from vora.build.base_llm import ALIASES
from vora.checkpoint.run_directory import replace_text
from vora.data.readers import EASY_VQA
from vora.train.packaged import find_recipe, in_package
from vora.train.recipe_sections import (
    DataSection,
    LoraSection,
    ModelSection,
    Recipe,
    Section,
    TeacherSection,
)
from vora.train.training_values import known_fields, nearest

OLD_KEYS = {  # what keys of recipes and specifications of ablations were called, and are called now
    "lora.keep_text": "lora.text_kl_weight",
    "teacher.eyes_scale": "teacher.vision_lr_scale",
    "teacher.image_only_steps": "teacher.distill_only_steps",
    "teacher.starts_eyes": "teacher.init_from_teacher",
    "data.row_tokens": "data.sequence_length",
    "data.blind": "data.text_only",
    "watch": "sample_generations",
    "arms": "variants",
    "evaluate.max_examples": "max_samples",
}
ELSEWHERE = {  # what keys are called in other libraries, and here
    "lr": "training.learning_rate",
    "lora.r": "lora.rank",
    "lora.lora_r": "lora.rank",
    "data.path": "data.sources.0.path",
    "model.name_or_path": "model.llm",
    "model.model_name_or_path": "model.llm",
    "model_name_or_path": "model.llm",
    "model.vision_tower": "teacher.name",
    "data.train_file": "data.sources",
    "data.dataset_name": "data.sources",
    "dataset_name": "data.sources",
    "train_file": "data.sources",
    "output_dir": "--out",
    "batch_size": "training.per_device_train_batch_size",
    "epochs": "training.num_train_epochs",
}
MOST_NAMED = 3  # of what is wrong with a recipe
MOST_VALUES = 100_000  # in a recipe
AnySection = TypeVar("AnySection", bound=Section)


class StrictLoader(yaml.SafeLoader):
    """YAML whose plain scalars mean what YAML 1.2 says, not 1.1, as PyYAML's: `no`, 2020-01-01 and 1:30 are texts,
    1e-3 is a number. A key that is there twice is an error."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ValueError(
                    f"the key {key.value} is there twice, in line {lines[key.value]} and in line {line}: keep one"
                )
            lines[key.value] = line
        return super().construct_mapping(node, deep)


for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def read_yaml(path: Path) -> dict[str, Any]:
    """What a YAML file of keys holds; a ValueError where it cannot be read, is no YAML, has no keys, or one twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
        _check_size(values)
    except OSError as error:
        raise ValueError(f"Cannot read recipe {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {_in_words(error)}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply: a recipe has a few levels.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys: a recipe has at least model and data.")
    return values


def _in_words(error: yaml.YAMLError) -> str:
    """Where YAML breaks off, and why; its own text shows it on a line below another."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    lines = (mark.buffer or "").splitlines()
    line = lines[mark.line].strip() if mark.line < len(lines) else "its end"
    cure = "indent with spaces, without tabs" if "\t" in line or "\\t" in (error.problem or "") else "check it"
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem} ({line[:60]!r}): {cure}."


def yaml_value(text: str) -> Any:
    """The value that a text stands for in YAML; what is no YAML, such as *.parquet, is that text."""
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, RecursionError):
        return text


def _check_size(values: Any) -> None:
    """Raise ValueError for more values than a recipe has, each counted as often as aliases repeat it."""
    count, left = 0, [values]
    while left:
        value = left.pop()
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        count += 1
        if count > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values, or aliases that repeat so many: write fewer")


def load_recipe(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe, of a YAML file, a name that `find_recipe` knows, or a dict. Overrides are texts
    `key=value` with dotted keys, such as `training.learning_rate=1e-3`, with values in YAML. A ValueError as of
    `validated`."""
    file = None if isinstance(source, dict) else find_recipe(source)
    values = read_yaml(file) if file is not None else dict(source)  # type: ignore[arg-type]
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(
                f"{override!r} is no override: write key=value without spaces, such as training.max_steps=100."
            )
        _override(values, key, yaml_value(value))
    if file is not None and "recipe" in values and "model" not in values:
        raise ValueError(f"{file} is a specification of an ablation, and no recipe: vora ablate {file}.")
    recipe = validated(Recipe, values, "recipe" if file is None else str(file))
    if file is not None:
        _resolve_paths(recipe, file.parent)
    return recipe


def save_recipe(recipe: Recipe, path: str | Path) -> None:
    """Write the resolved recipe, defaults included."""
    replace_text(Path(path), yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, width=110))


def validated(kind: type[AnySection], values: dict[str, Any], name: str) -> AnySection:
    """Values as a `Section` of that kind; `name` is that of their source in messages. A ValueError names the unknown,
    old and missing keys and values of the wrong kind, the first of them where they are many."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda one: one["type"] == "missing")
        causes = [_explain(kind, one) for one in found[:MOST_NAMED]]
        more = [f"and {len(found) - MOST_NAMED} more"] * (len(found) > MOST_NAMED)
        raise ValueError(f"{name}: {'; '.join([*causes, *more])}") from None


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key, in which a number counts the entries of a list, and `+` as the last adds one."""
    *path, leaf = key.split(".")
    section: Any = values
    try:
        for part, following in zip(path, [*path[1:], leaf]):
            if isinstance(section, dict) and section.get(part) is None:  # left out, or null as in a run's own recipe
                section[part] = {"0": [{}], "+": []}.get(following, {})
            section = section[int(part)] if isinstance(section, list) else section[part]
        if isinstance(section, list) and leaf == "+":
            section.append(value)
        else:
            section[int(leaf) if isinstance(section, list) else leaf] = value
    except (IndexError, ValueError, TypeError, AttributeError):
        nowhere = f"{key} names no place in the recipe: check the numbers and names before the last dot"
        raise ValueError(f"{_renamed(key) or nowhere}.") from None


def _whole_name(key: str) -> str | None:
    """The key of a section that was given without its section."""
    sections: dict[str, type[Section]]
    sections = {"model": ModelSection, "lora": LoraSection, "teacher": TeacherSection, "data": DataSection}
    found = [f"{name}.{key}" for name, section in sections.items() if key in section.model_fields]
    return found[0] if found else f"training.{key}" if key in known_fields() else None


def _renamed(key: str) -> str | None:
    """What to do about a key of earlier versions; None for any other."""
    now = OLD_KEYS.get(re.sub(r"\.\d+", "", key))  # of any entry of a list
    return f"{key} is called {now} now: rename it" if now else None


def _explain(section: type[Section], error: Any) -> str:
    place, is_recipe = ".".join(str(part) for part in error["loc"]), section is Recipe
    if error["type"] == "extra_forbidden":
        for part in error["loc"][:-1]:
            if isinstance(part, str):
                annotation = section.model_fields[part].annotation
                candidates = [annotation, *getattr(annotation, "__args__", ())]
                section = next(c for c in candidates if isinstance(c, type) and issubclass(c, Section))
        if is_recipe and (now := ELSEWHERE.get(place) or _whole_name(place)):
            return f"unknown key {place}: it is {now} here"
        near = nearest(error["loc"][-1], section.model_fields)
        near += "; `vora init --keys` prints all" if is_recipe and ", ..." in near else ""
        return _renamed(place) or f"unknown key {place}{near}"
    if error["type"] == "missing":
        return f"{place} is missing"
    quote = f" (write '{error['input']}' in quotes)" if error["type"] == "string_type" else ""
    if error["type"] == "list_type":
        return f"{place}: {error['input']!r} is no list: write [{error['input']}]"
    if error["type"] in ("model_type", "model_attributes_type"):
        key = {"teacher": "name", "model": "llm", "lora": "rank", "data": "sources"}.get(place, "KEY")
        return f"{place}: {error['input']!r} is no section of keys: set one of them, such as {place}.{key}"
    message = error["msg"].removeprefix("Value error, ")
    return f"{place}: {message}{quote}" if place else message


def _resolve_paths(recipe: Recipe, folder: Path) -> None:
    """Paths that exist beside the recipe are taken from there."""

    def beside(text: Any) -> Any:
        if text in (*ALIASES, EASY_VQA):  # recipes/smollm2-135m is no LLM
            return text
        if text and (ours := in_package(text)):
            return str(ours)
        return str((folder / text).resolve()) if text and len(text) < 200 and (folder / text).exists() else text

    def pattern_beside(text: str) -> str:
        there, here = str(folder.resolve() / text), str(Path(text).resolve())
        return here if glob(here, recursive=True) and not glob(there, recursive=True) else there

    named = [(recipe.model, "llm"), (recipe.model, "vora"), (recipe.model, "encoder"), (recipe.teacher, "name")]
    for section, key in named:
        if section is not None:
            setattr(section, key, beside(getattr(section, key)))
    if recipe.data.folder is not None:
        recipe.data.folder = str(Path(beside(recipe.data.folder)).resolve())  # evaluations start there too
    validation = recipe.data.validation
    for entry in [*recipe.data.sources, *(validation.sources if validation else [])]:
        if recipe.data.folder is not None:
            entry.path = str(Path(recipe.data.folder, entry.path))
        is_pattern = any(mark in entry.path for mark in "*?[")
        entry.path = pattern_beside(entry.path) if is_pattern else beside(entry.path)
        entry.image_folder = beside(entry.image_folder)
    for sample in recipe.sample_generations:
        sample.image = beside(sample.image)
    template = recipe.model.chat_template
    if template and "\n" not in template and "{" not in template:
        path = in_package(template) or folder / template
        if not path.exists():
            raise ValueError(f"model.chat_template {path} does not exist: give a path beside the recipe, or Jinja.")
        recipe.model.chat_template = path.read_text()
