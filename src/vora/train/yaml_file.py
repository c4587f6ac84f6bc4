"""YAML files of keys, read strictly: texts stay texts, and no key is dropped in silence."""

import re
from pathlib import Path
from typing import Any

import yaml


class StrictLoader(yaml.SafeLoader):
    """YAML whose plain scalars mean what YAML 1.2 says: `no`, `off`, 2020-01-01 and 1:30 are texts, 1e-3 is a number.

    PyYAML reads YAML 1.1, in which `save_strategy: no` is a boolean. A key that is there twice is an error.
    """

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
    except OSError as error:
        raise ValueError(f"Cannot read recipe {path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): save it as UTF-8.") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no keys: a recipe has at least model and data.")
    return values


def yaml_value(text: str) -> Any:
    """The value that a text stands for in YAML; what is no YAML, such as *.parquet, is that text."""
    try:
        return yaml.load(text, StrictLoader)
    except yaml.YAMLError:
        return text
