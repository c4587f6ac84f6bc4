"""Options and arguments that several verbs have: one idea has one name everywhere."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option
from typer.models import OptionInfo

DTYPES = ("float32", "bfloat16", "float16")


def out_folder(help: str) -> OptionInfo:
    """Where a verb writes. Folders above it are made; what something else has left there is never overwritten. That
    it cannot be written is said before any work."""
    return Option("--out", "-o", help=help, file_okay=False, callback=can_be_written)


def out_file(help: str) -> OptionInfo:
    """As `out_folder`, of a verb that writes a file and perhaps others of its name."""
    return Option("--out", "-o", help=help, dir_okay=False, callback=can_be_written)


def also_folder(help: str) -> OptionInfo:
    """Where a verb writes more, under a name of its own."""
    return Option(help=help, file_okay=False, callback=can_be_written)


def also_file(help: str) -> OptionInfo:
    """As `also_folder`, of a file."""
    return Option(help=help, dir_okay=False, callback=can_be_written)


def can_be_written(place: Path | None) -> Path | None:
    """The place itself; an error where nothing can be written there, for what is above it."""
    if place is not None:
        there = next(one for one in (place, *place.absolute().parents) if one.exists())
        if there != place and not there.is_dir():
            raise BadParameter(f"{there} is a file, so that {place} cannot be written in it.")
        if not os.access(there, os.W_OK):
            raise BadParameter(f"{there} cannot be written by you: choose another place.")
    return place


def no_folders(images: list[str] | str | None) -> list[str] | str | None:
    """The names of images themselves; an error where one is a folder's."""
    for image in [images] if isinstance(images, str) else images or ():
        if Path(image).is_dir():
            raise BadParameter(f"{image} is a folder, and no image: name images; a model's folder is -m {image}.")
    return images


def names_of_recipes(incomplete: str) -> list[str]:
    """For the shell's completion: the recipes that come with the package."""
    from vora.train.packaged import packaged_recipes

    return [name for name in packaged_recipes() if name.startswith(incomplete)]


def names_of_specifications(incomplete: str) -> list[str]:
    """For the shell's completion: the specifications of ablations that come with the package."""
    return [name for name in names_of_recipes(incomplete) if "/ablations/" in name and not name.endswith("/base")]


def _dtype(value: str | None) -> str | None:
    if value is not None and value not in DTYPES:
        raise BadParameter(f"{value} is none of {', '.join(DTYPES)}.")
    return value


def _device(value: str | None) -> str | None:
    if value is not None and value.split(":")[0] not in ("cpu", "cuda", "mps", "xpu"):
        raise BadParameter(f"{value} is no device: say cpu, cuda, cuda:1, ...")
    return value


def _trust(wanted: bool) -> bool:
    if wanted:
        from vora.build.hub import trust_remote_code

        trust_remote_code()
    return wanted


def named_columns(pairs: list[str] | None) -> dict[str, str]:
    """The values of `Columns` as {our name: the file's}."""
    if wrong := [pair for pair in pairs or () if "=" not in pair]:
        raise ValueError(f"--column {wrong[0]} is not of the form ours=theirs, such as captions=alt_text.")
    return dict(pair.split("=", 1) for pair in pairs or ())


def need(extra: str, *modules: str, otherwise: str = "") -> None:
    """Raise ValueError, before anything large is imported, unless modules that an extra brings are installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ValueError(f"{' and '.join(missing)} not installed: pip install 'vora-vlm[{extra}]'{otherwise}.")


def listed(text: str | None) -> list[str] | None:
    """The values of an option with commas between them."""
    return None if text is None else [one.strip() for one in text.split(",") if one.strip()]


RecipeArgument = Annotated[
    str,
    Argument(
        metavar="RECIPE",
        help="YAML file, or a recipe of the package such as smollm2-135m/pretrain.",
        autocompletion=names_of_recipes,
    ),
]
Overrides = Annotated[list[str] | None, Argument(help="key=value, such as training.max_steps=100.")]
ModelOption = Annotated[str | None, Option("--model", "-m", help="Folder or hub id of a model, or run directory.")]
DeviceOption = Annotated[
    str | None, Option("--device", callback=_device, help="cpu, cuda or cuda:1; by default a GPU if there is one.")
]
DtypeOption = Annotated[
    str | None, Option("--dtype", callback=_dtype, help=f"{', '.join(DTYPES)}; the model's own by default.")
]
Columns = Annotated[list[str] | None, Option("--column", help="ours=theirs, such as captions=alt_text.")]
MinImageTokens = Annotated[int | None, Option(min=1, help="Fewest tokens of an image; the model's own by default.")]
MaxImageTokens = Annotated[int | None, Option(min=1, help="Most tokens of an image; the model's own by default.")]
BaseLlm = Annotated[str | None, Option("--llm", help="Base LLM of an adapter that does not name it.")]
Unmerged = Annotated[
    bool,
    Option("--unmerged", help="Of a run or adapter: keep LoRA apart, so that text without images is the LLM's own."),
]
RemoteCode = Annotated[
    bool, Option("--trust-remote-code", callback=_trust, help="Run code that lies beside models; read it first.")
]
