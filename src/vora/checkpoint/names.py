"""Names of models and data that may be published: folders of this machine are nobody else's business."""

import os
import re
from typing import Any

from vora.build.hub import may_be_hub_id

HUB_ID_OF_ALIAS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def is_hub_id(name: str) -> bool:
    """Whether a name is owner/name on the hub, and nothing on this machine."""
    return "/" in name and may_be_hub_id(name) and not os.path.exists(name)


def published(name: object) -> str:
    """A name that anyone may read: a hub id as it is, an alias as the hub id behind it, of a path its last part."""
    name = HUB_ID_OF_ALIAS.get(str(name), str(name))
    return name if is_hub_id(name) or re.match(r"(?!file:)\w+://", name) else _last_part(name)


def loadable(name: str | None) -> str | None:
    """A name by which a model can be fetched anywhere (a hub id or an alias); None for a folder of this machine."""
    return None if not name or _is_path(name) or os.path.exists(name) else name


def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path.replace("\\", "/")))


def _is_path(text: str) -> bool:
    return bool(re.match(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:", text))


def without_folders(value: Any) -> Any:
    """A recipe whose paths are cut down to their last parts."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_folders(entry) for entry in value]
    if isinstance(value, str) and "\n" not in value:
        if _is_path(value) or (os.path.exists(value) and re.search(r"[/\\]", value)):
            return _last_part(value)
    return value


def command_without_folders(command: str) -> str:
    """A command line whose paths are cut down, behind `--option=` too."""
    words = [word.rpartition("=") for word in command.split(" ")]
    return " ".join(before + equals + without_folders(word) for before, equals, word in words)
