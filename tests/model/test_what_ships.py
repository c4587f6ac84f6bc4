"""What a checkpoint's remote code must not do, read from its sources."""

import ast
from pathlib import Path

import pytest
from test_house import imports_of

import vora.model

NETWORK = {"http", "httpx", "requests", "socket", "ssl", "urllib", "huggingface_hub", "ftplib", "asyncio"}
PROGRAMS = {"subprocess", "multiprocessing", "ctypes", "pty", "importlib", "runpy"}
CALLS = {"eval", "exec", "__import__", "system", "popen", "from_pretrained", "hf_hub_download", "snapshot_download"}


@pytest.mark.parametrize("path", Path(vora.model.__file__).parent.glob("*.py"), ids=lambda path: path.name)
def test_a_file_of_the_model_loads_starts_and_fetches_nothing(path):
    imports = {name.split(".")[0] for level, name in imports_of(path) if not level}
    assert not imports & PROGRAMS
    assert path.name == "fetch_image.py" or not imports & NETWORK
    called = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    # Hugging Face's own methods are inherited, and called by whoever loads
    assert not {getattr(function, "attr", getattr(function, "id", "")) for function in called} & CALLS
