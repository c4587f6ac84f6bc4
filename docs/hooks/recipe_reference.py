"""Fills the page on recipes with the keys of the pydantic models that read them, so that it cannot be out of date."""

import ast
from pathlib import Path
from typing import Any

MARK = "<!-- reference of the keys -->"
RECIPE = Path(__file__).resolve().parents[2] / "src" / "vora" / "train" / "recipe_sections.py"


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Called by mkdocs for each page."""
    return markdown.replace(MARK, reference(RECIPE.read_text()))


def reference(source: str) -> str:
    """Tables of the sections in `recipe.py`: read as text, so that building the site installs nothing of vora."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    sections = {
        name: node for name, node in classes.items() if any("Section" in ast.unparse(base) for base in node.bases)
    }
    return "\n".join(_section(name, sections[name]) for name in ["Recipe", *(n for n in sections if n != "Recipe")])


def _section(name: str, node: ast.ClassDef) -> str:
    lines = [f"### {name.removesuffix('Section')}\n", f"{(ast.get_docstring(node) or '').partition(chr(10) * 2)[0]}\n"]
    lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            default, meaning = _default_and_meaning(field.value)
            kind = ast.unparse(field.annotation).replace("Section", "")
            lines.append(f"| `{field.target.id}` | `{kind}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _default_and_meaning(value: ast.expr | None) -> tuple[str, str]:
    if value is None:
        return "required", ""
    if not (isinstance(value, ast.Call) and ast.unparse(value.func) == "Field"):
        return f"`{ast.unparse(value).replace('Section()', ' section')}`", ""
    given = {keyword.arg: keyword.value for keyword in value.keywords}
    default = value.args[0] if value.args else given.get("default", given.get("default_factory"))
    shown = "required" if default is None or ast.unparse(default) == "..." else f"`{ast.unparse(default)}`"
    description = given.get("description")
    meaning = "" if description is None else str(ast.literal_eval(description))
    return shown, " ".join(meaning.split()).replace("|", "\\|")
