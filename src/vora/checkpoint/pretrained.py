"""The model that comes with the package."""

from importlib.resources import files

NAME = "vora-smollm2-135m"  # for people


def committed_model() -> str:
    """Folder of the vision adapter that is used where no model is named; its LLM is fetched."""
    return str(files("vora") / "pretrained")
