"""The house keeps its own rules: who imports whom, types, words, sizes; what README and docs say is true."""

import ast
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import typer

from vora.ablate.spec import Spec
from vora.cli import app
from vora.train.recipe import Recipe
from vora.train.reference import lines

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "vora"
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(SOURCE.rglob("*.py"))
COMMANDS = typer.main.get_command(app).commands
FENCE = re.compile(r"```[a-z]*\n(.*?)```", flags=re.S)

ABOVE_MODEL = {"model", "build", "distill", "baselines", "checkpoint"}
MAY_IMPORT = {  # others nothing
    "build": {"model"},
    "distill": {"model", "build"},
    "baselines": {"model", "build", "distill"},
    "checkpoint": ABOVE_MODEL,
    "data": {"model", "build", "report"},
    "train": ABOVE_MODEL | {"data", "report"},
    "eval": {"model", "checkpoint", "data", "report"},
    "serve": {"model", "checkpoint", "export", "report"},
    "export": {"model", "checkpoint"},
    "registration": {"model", "build", "baselines"},
}
EVERYTHING = {"ablate", "quickstart", "cli", "__init__", "__main__"}
PROGRAMS = {"subprocess", "multiprocessing", "ctypes", "pty", "importlib", "runpy"}
MODEL_LIBRARIES = {"torch", "transformers", "numpy", "PIL", *sys.stdlib_module_names} - PROGRAMS
NETWORK = {"http", "socket", "ssl", "urllib", "ftplib", "asyncio"}
CALLS = {"eval", "exec", "__import__", "system", "popen", "from_pretrained", "hf_hub_download", "snapshot_download"}
# the left column of the table of words: not in options, recipe keys and README
PRIVATE_WORDS = (
    r"eyes?|over_llm|pictures?|keep_text|spare_text|eyes_scale|image_only_steps|stretch(es)?|by_stretch|row_tokens|blind"
    r"|told|asked|showings?|scenes|readings|arms?|cells?|ledger|settle\w*|calm_start|take_up|refuse_\w*|survey"
    r"|outline|pace|watch"
)


def imports_of(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
        elif isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_rooms_import_only_what_they_may(path):
    parts = path.relative_to(SOURCE).parts
    room = parts[0].removesuffix(".py")
    allowed = MAY_IMPORT.get(room, set()) | ({"distill"} if parts[:2] == ("eval", "inspect") else set())
    for level, module in imports_of(path):
        if level:
            assert room == "model", f"relative import of {module} in {path.name}"
        elif module.split(".")[0] == "vora" and room not in EVERYTHING:
            other = module.split(".")[1] if "." in module else "__init__"
            assert other == room != "model" or other in allowed, f"{room} imports {other}"


def test_what_ships_is_small_and_loads_starts_and_fetches_nothing():
    files = sorted((SOURCE / "model").glob("*.py"))
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1800
    for path in files:
        imports = {module.split(".")[0] for level, module in imports_of(path) if not level}
        assert imports <= MODEL_LIBRARIES and (path.name == "fetch_image.py" or not imports & NETWORK), path.name
        called = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        # Hugging Face's own methods are inherited, and called by whoever loads
        assert not {getattr(function, "attr", getattr(function, "id", "")) for function in called} & CALLS, path.name


def test_no_file_is_long_and_no_name_says_nothing():
    folders = ("src", "tests", "benchmarks", "examples", "scripts")
    scripts = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert not [path for path in scripts if len(path.read_text().splitlines()) > 400]
    assert not {path.stem for path in scripts} & {"utils", "util", "common", "helpers", "helper", "misc"}


def test_public_functions_are_annotated():
    found, bare = 0, []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                found += 1
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                if node.returns is None or not all(a.annotation for a in arguments if a.arg not in ("self", "cls")):
                    bare.append(f"{path.stem}:{node.name}")
    assert len(bare) <= 0.05 * found, f"{len(bare)} of {found}: {bare[:20]}"


def test_words_are_those_of_the_ecosystem():
    options = {option for command in COMMANDS.values() for p in command.params for option in [*p.opts, p.name]}
    schemas = [kind.model_json_schema() for kind in (Recipe, Spec)]
    sections = [section for schema in schemas for section in (schema, *schema["$defs"].values())]
    names = options | {key for section in sections for key in section["properties"]}
    private = re.compile(rf"(^|[_-])({PRIVATE_WORDS})($|[_-])")
    assert not [name for name in names if private.search(name.lstrip("-"))]
    assert not re.findall(rf"\b(?:{PRIVATE_WORDS})\b", README.lower())


def test_readme_is_an_entrance():
    assert len(README.split()) <= 1500
    first = FENCE.search(README)[1].strip().splitlines()
    assert len(first) == 2 and "vora quickstart" in first[0] and "pytest" in first[1]


def test_every_vora_command_in_readme_and_docs_parses():
    """Of all code blocks and code spans."""
    start = r"(?:^|&& |-m vora\.cli |no-python )\s*(?:vora )(\w[\w-]*.*?)(?=&&|#|$)"
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        spans = re.findall(r"`(vora [^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
        lines = "\n".join([*FENCE.findall(text), *spans])
        found += [(page.name, command.split()) for command in re.findall(start, lines, flags=re.M)]
    assert {"quickstart", "train", "merge", "chat", "eval"} <= {words[0] for _, words in found}
    for page, (verb, *rest) in found:
        assert verb in COMMANDS, f"{page}: there is no vora {verb}"
        options = {option for p in COMMANDS[verb].params for option in [*p.opts, *p.secondary_opts]} | {"--help"}
        unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options]
        assert not unknown, f"{page}: vora {verb} has no {unknown}"


def test_every_recipe_key_is_described_in_the_reference():
    spec = spec_from_file_location("hook", ROOT / "docs" / "hooks" / "recipe_reference.py")
    spec.loader.exec_module(hook := module_from_spec(spec))
    assert hook.MARK in (ROOT / "docs" / "keys.md").read_text()
    found = hook.on_page_markdown(hook.MARK)
    rows = dict(re.findall(r"^\| `(?:[\w.]+\.)?(\w+)` \|.*\| ([^|]*) \|$", found, flags=re.M))
    schema = Recipe.model_json_schema()
    assert len(rows) > 60 and {key for one in (schema, *schema["$defs"].values()) for key in one["properties"]} <= {
        *rows
    }
    whole = ("model.llm", "data.sources.0.augment.crop", "data.validation.share", "sample_generations.0.question")
    for key in (*whole, "teacher.standardize", "training.report_to"):
        assert f"| `{key}` |" in found
    assert not [key for key, meaning in rows.items() if not meaning.strip()]
    printed = {line.split(" = ")[0] for line in lines()}  # `vora init --keys`
    assert printed == {*re.findall(r"^\| `([\w.]+)` \|", found, flags=re.M)} and "lora.rank" in printed


def test_files_named_in_readme_and_docs_exist():
    folders, kinds = "recipes|benchmarks|examples|requirements|tests", "yaml|sh|py|ipynb|jsonl|txt"
    for page in PAGES:
        names = re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:{kinds})\b", page.read_text())
        assert not [name for name in names if not (ROOT / name).exists()], page.name


def test_table_of_places_is_true():
    page = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `([\w/]+\.py)(?:: ([\w.]+))?` \|$", page, flags=re.M)
    assert len(rows) >= 20
    for file, name in rows:
        body = ast.parse((SOURCE / file).read_text()).body
        for part in name.split(".") if name else []:
            found = [n for n in body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part]
            assert found, f"{file} has no {name}"
            body = found[0].body


def test_no_path_of_a_machine_in_what_ships():
    product = [*MODULES, *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "examples").glob("*.*"), *PAGES]
    named = re.compile(r"""["' `(](/(tmp|work|root|home)/|\.\./shared)""")
    assert not [path.name for path in product if path.suffix != ".jsonl" and named.search(path.read_text())]
