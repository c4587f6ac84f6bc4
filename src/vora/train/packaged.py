"""Recipes and specifications of ablations that come with the package, by name: `smollm2-135m/pretrain`."""

import difflib
from pathlib import Path

DATA = (".jsonl", ".csv", ".tsv", ".parquet", ".tar", ".arrow")  # not .json, which is YAML too
PACKAGE = Path(__file__).resolve().parents[1]


def recipes_folder() -> Path:
    """Where they lie: in the installed package, or in a checkout beside its `src`."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "recipes"


def packaged_recipes() -> list[str]:
    """Their names, sorted."""
    folder = recipes_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """The file at a path, or else the packaged one of that name; a ValueError lists near names where both fail."""
    path = Path(name)
    if path.suffix.lower() in DATA and path.exists():
        raise ValueError(f"{name} is data, and no recipe: vora init mine --data {name} writes one.")
    if path.is_file():
        return path
    if (path / "recipe.yaml").is_file():
        raise ValueError(f"{name} is a folder, perhaps of a run: name its recipe, {path / 'recipe.yaml'}.")
    wanted, known = path.as_posix().removeprefix("recipes/").removesuffix(".yaml"), packaged_recipes()
    if wanted in known:
        return recipes_folder() / f"{wanted}.yaml"
    if path.is_dir():
        what = "is a model's folder" if (path / "config.json").exists() else "is a folder"
        raise ValueError(f"{name} {what}, and no recipe: name a YAML file; `vora init` writes one.")
    if inside := [one for one in known if one.startswith(f"{wanted}/") and "/ablations/" not in one]:
        raise ValueError(f"{name} has several recipes: say which of {', '.join(inside)}.")
    here = [file.as_posix() for file in path.parent.glob("*.y*ml")]
    near = difflib.get_close_matches(path.as_posix(), here) + difflib.get_close_matches(wanted, known, n=4, cutoff=0.4)
    listed = f"near names are {', '.join(near)}" if near else "`vora init` writes one"
    raise ValueError(f"Cannot read recipe {name}: no such file, and the package has none of that name; {listed}.")


def in_package(text: str) -> Path | None:
    """The place in the package that a path `vora/...` of a recipe names, if there is such a one."""
    path = PACKAGE.parent / text
    return path if text.startswith("vora/") and path.exists() else None
