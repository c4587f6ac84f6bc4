"""The model that comes with the package."""

from importlib.resources import files


def committed_model():
    """Folder of the eyes that are used where no model is named, over an LLM that is fetched; see `over_llm.py`."""
    return str(files("vora") / "pretrained")
