"""The model that comes with the package, once there is one."""

from importlib.resources import files
from pathlib import Path


def committed_model():
    """Folder of the model that is used where none is named.

    Raises:
        ValueError: this version comes without one.
    """
    folder = Path(str(files("vora"))) / "pretrained"
    if (folder / "config.json").exists():
        return str(folder)
    raise ValueError(
        "No model named, and this version of vora comes without one: give one with -m MODEL, or make one with "
        "`vora quickstart` (-m vora-quickstart/model)."
    )
