"""The house keeps its own rules: who imports whom, that the README's table and commands are true."""

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vora
from vora.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "vora"
README = (ROOT / "README.md").read_text()

MAY_IMPORT = {
    "model": set(),
    "distill": {"model"},
    "adapt": {"model", "distill"},
    "data": {"model"},
    "train": {"model", "adapt", "distill", "data"},
    "eval": {"model", "adapt", "distill", "data"},
    "serve": {"model", "adapt", "distill", "data", "eval"},
    "ablate": {"model", "adapt", "distill", "data", "train", "eval"},
    "quickstart": {"model", "adapt", "distill", "data", "train", "eval", "serve"},
    "cli": {"model", "adapt", "distill", "data", "train", "eval", "serve", "ablate", "quickstart"},
}
MODEL_LIBRARIES = {"torch", "transformers", "numpy", "PIL"}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_what_they_may(path):
    parts = path.relative_to(SOURCE).parts
    room = parts[0].removesuffix(".py")
    if room == "__init__":
        return
    for level, module in imports_of(path):
        if level:
            assert room == "model", f"relative import of {module} in {path.name}"
        elif module.split(".")[0] == "vora":
            other = module.split(".")[1]
            assert other == room or other in MAY_IMPORT[room], f"{room} imports {other}"
            assert room != "model", "model/ is copied into checkpoints: siblings by relative import only"


@pytest.mark.parametrize("path", sorted((SOURCE / "model").glob("*.py")), ids=lambda path: path.name)
def test_what_ships_needs_only_torch_and_transformers(path):
    import sys

    used = {module.split(".")[0] for level, module in imports_of(path) if not level}
    assert used <= MODEL_LIBRARIES | set(sys.stdlib_module_names)


def test_no_room_says_nothing():
    names = {path.stem for path in SOURCE.rglob("*")} | {path.stem for path in (ROOT / "tests").rglob("*")}
    assert not names & {"utils", "util", "common", "helpers", "helper", "misc"}


def test_readme_table_of_places_is_true():
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)(?:: ([\w.]+))?` \|$", README, flags=re.M)
    assert len(rows) >= 8
    for file, name in rows:
        tree = ast.parse((SOURCE / file).read_text())
        for part in name.split(".") if name else []:
            found = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
            assert found, f"{file} has no {name}"
            tree = found[0]


def test_readme_opens_with_two_commands():
    block = re.search(r"```[a-z]*\n(.*?)```", README, flags=re.S).group(1).strip().splitlines()
    assert len(block) == 2
    assert "vora quickstart" in block[0] and "pytest" in block[1]


def test_every_vora_command_in_the_readme_exists():
    lines = [
        line.strip() for fence in re.findall(r"```[a-z]*\n(.*?)```", README, flags=re.S) for line in fence.splitlines()
    ]
    commands = {
        tuple(re.search(r"\bvora ([\w-]+)(.*)", line).groups()) for line in lines if re.search(r"(^|&& )vora \w", line)
    }
    assert {"quickstart", "train", "merge", "chat"} <= {verb for verb, _ in commands}
    for verb, rest in commands:
        shown = CliRunner().invoke(app, [verb, "--help"], terminal_width=200)
        assert shown.exit_code == 0, verb
        for option in re.findall(r"(?<= )--?[a-z][a-z-]*", rest):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown.output), f"vora {verb} has no {option}"


def test_public_names_are_documented():
    for name in vora.__all__:
        assert getattr(vora, name).__doc__, name
