"""What a checkpoint's remote code may hold, read from its sources."""

import ast
import sys
from pathlib import Path

import pytest

import vora.model

FILES = sorted(Path(vora.model.__file__).parent.glob("*.py"))
NETWORK = {"http", "httpx", "requests", "socket", "ssl", "urllib", "huggingface_hub", "ftplib", "asyncio"}
PROGRAMS = {"subprocess", "multiprocessing", "ctypes", "pty", "importlib", "runpy"}
CALLS = {"eval", "exec", "__import__", "system", "popen", "from_pretrained", "hf_hub_download", "snapshot_download"}


def imports_of(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_of_the_model_loads_starts_and_fetches_nothing(path):
    tree = ast.parse(path.read_text())
    imports = {name.split(".")[0] for name in imports_of(tree) if not name.startswith(".")}
    assert imports <= {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names}
    assert not imports & PROGRAMS
    assert path.name == "fetch_image.py" or not imports & NETWORK
    called = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {getattr(function, "attr", getattr(function, "id", "")) for function in called}
    # Hugging Face's own methods are inherited, and called by whoever loads
    assert not names & CALLS


def test_it_stays_small():
    sizes = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert sum(sizes.values()) <= 1800 and max(sizes.values()) <= 400, sizes
