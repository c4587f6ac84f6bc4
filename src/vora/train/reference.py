"""All keys of a recipe from the pydantic models that read them, so that no list of them can be out of date."""

import re
from collections.abc import Iterator
from inspect import formatannotation
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vora.train.from_recipe import DEFAULTS
from vora.train.recipe_sections import Recipe, Section


def lines() -> Iterator[str]:
    """A line for each key by its whole name: type, default, meaning."""
    for row in markdown().splitlines():
        if row.startswith("| `"):
            key, *rest = [cell.strip() for cell in re.split(r"(?<!\\)\|", row.replace("`", ""))[1:-1]]
            kind, default, meaning = rest if len(rest) == 3 else ("", rest[0], "")  # of `training`: its default alone
            yield f"{key} = {default}" + (f"  # {kind}. {meaning}" if kind else "")


def markdown() -> str:
    """The tables of all sections, and what `training` is if it says nothing."""
    rows = (f"| `training.{name}` | `{_yaml(value)}` |" for name, value in DEFAULTS.items())
    ours = ["## training\n\nOur defaults; the other fields keep theirs.\n\n| key | default |\n|---|---|", *rows]
    return "\n".join([*_tables(Recipe, "", set()), *ours])


def _tables(section: type[Section], path: str, seen: set[type[Section]]) -> Iterator[str]:
    """A table of a section's keys by their whole names, then of each section in it; of a list its first entry."""
    seen.add(section)
    yield f"## {path.rstrip('.') or 'A recipe'}\n\n{(section.__doc__ or '').partition(chr(10) * 2)[0]}\n"
    yield "| key | type | default | meaning |\n|---|---|---|---|"
    fields = section.model_fields.items()
    yield from (f"| `{path}{name}` | {_type(one)} | {_default(one)} | {_meaning(one)} |" for name, one in fields)
    yield ""
    for name, field in fields:
        for inner, is_entry in _sections(field.annotation):
            if inner not in seen:
                yield from _tables(inner, f"{path}{name}.{'0.' if is_entry else ''}", seen)


def _sections(kind: Any, is_entry: bool = False) -> Iterator[tuple[type[Section], bool]]:
    """The sections that a type names, and whether they are entries of a list."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind, is_entry
    for part in get_args(kind):
        yield from _sections(part, get_origin(kind) is list)


def _type(field: FieldInfo) -> str:
    if get_origin(field.annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(field.annotation))
    said = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    annotation = str(said.get("type") or formatannotation(field.annotation))
    words = re.sub(r"[\w.]+\.(?=\w)|Section\b", "", annotation)  # without modules
    return " or ".join(f"`{one}`" for one in words.replace("None", "null").split(" | "))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "its own" if isinstance(field.default, BaseModel) else f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).splitlines()[0]


def _meaning(field: FieldInfo) -> str:
    return (field.description or "").replace("|", "\\|")
