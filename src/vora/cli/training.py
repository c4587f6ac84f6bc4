"""Verbs before there is a model: what trains one, what shows it before, what compares."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Exit, Option

from vora.cli.app import app, console, starting
from vora.cli.options import (
    Columns,
    Overrides,
    RecipeArgument,
    RemoteCode,
    can_be_written,
    listed,
    named_columns,
    names_of_specifications,
    out_folder,
)

if TYPE_CHECKING:
    from vora.train.recipe_sections import DataSection


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, out_folder("For result.json, report.html and the model.")] = Path("vora-quickstart"),
    llm: Annotated[str, Option(help="LLM to train: alias, folder or hub id.")] = "smollm2-135m",
    minutes: Annotated[float, Option(min=1, help="For everything; training is planned to fit.")] = 13.0,
    seed: Annotated[int, Option(help="Seed of data order and fresh weights.")] = 0,
) -> None:
    """Teach a small LLM to see in a quarter of an hour on two CPU cores: train, merge, measure, report."""
    with starting():
        from vora.quickstart.run import run_quickstart

    run_quickstart(out, llm=llm, minutes=minutes, seed=seed, overrides=overrides or (), console=console)


def _print_keys(wanted: bool) -> None:
    if wanted:
        from vora.train.reference import lines

        print("\n".join(lines()))
        raise Exit


@app.command()
def init(
    name: Annotated[str, Argument(metavar="[NAME]", help="NAME.yaml is written.")] = "recipe",
    llm: Annotated[str, Option(help="LLM that is to see: alias, folder or hub id.")] = "smollm2-135m",
    data: Annotated[list[str] | None, Option(help="Files, folders or datasets; once for each.")] = None,
    teacher: Annotated[
        str | None, Option(help="A plain ViT: folder or hub id; by default one of fitting size.")
    ] = None,
    column: Columns = None,
    image_folder: Annotated[
        Path | None, Option(exists=True, file_okay=False, help="Where paths of images in --data start.")
    ] = None,
    epochs: Annotated[float, Option(min=0.01, help="How often the data is read, if --data is given.")] = 3.0,
    keys: Annotated[
        bool, Option("--keys", callback=_print_keys, is_eager=True, help="Print all keys of recipes and exit.")
    ] = False,
) -> None:
    """Write a recipe for your LLM, your data and this machine, with what it found out as comments."""
    path = Path(name if name.endswith(".yaml") else f"{name}.yaml")
    if path.exists():
        raise ValueError(f"{path} is there already: choose another NAME, so that nothing is overwritten.")
    can_be_written(path)
    with starting():
        from vora.train.first_recipe import write_recipe

    folder = None if image_folder is None else str(image_folder)
    for line in write_recipe(path, llm, data or [], teacher, epochs, named_columns(column), folder):
        console.print(f"* {line}", highlight=False, markup=False)
    console.print(f"Wrote {path}. Next: vora train {shlex.quote(str(path))} --dry-run", highlight=False)


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, out_folder("For summary.json, samples.html, bad_samples.jsonl.")] = Path("vora-data"),
    show: Annotated[int, Option(help="Samples on the page.")] = 20,
    max_samples: Annotated[int | None, Option(min=1, help="Only the first rows of each source.")] = None,
    workers: Annotated[int, Option(help="Worker processes; 0 reads in this one.")] = 2,
) -> None:
    """Read a recipe's data before training: what is in it, what is bad, how it packs, and how it looks."""
    from vora.train.packaged import find_recipe

    path = find_recipe(recipe)  # before seconds of imports
    with starting():
        from vora.train.preview import preview
        from vora.train.recipe import load_recipe

    summary = preview(load_recipe(path, overrides or ()), out, show, max_samples, workers, console)
    if not summary["num_samples"]:
        raise ValueError(f"All {summary['num_bad']} samples are bad: {out / 'bad_samples.jsonl'} says why.")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str | None, Option(help="Such as h200 or l4; by default this machine.")] = None,
    num_gpus: Annotated[int, Option(min=1, help="How many, in machines of 8.")] = 1,
    utilization: Annotated[
        float | None, Option(min=0.01, max=1, help="Assumed share of the peak FLOP/s; 0.4, with AMX 0.2.")
    ] = None,
    num_text_tokens: Annotated[int, Option(min=2, help="Text tokens of a sample, if the data is not here.")] = 150,
    num_labels: Annotated[int, Option(min=1, help="Those of them with a label.")] = 100,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a run will need: parameters, FLOPs, memory, disk, hours, and what bounds it."""
    import json

    from vora.train.packaged import find_recipe

    path = find_recipe(recipe)
    with starting():
        from vora.train.plan.device import GPUS, device_at_hand
        from vora.train.plan.plan import plan as run
        from vora.train.plan.table import plan_table
        from vora.train.recipe import load_recipe

    if gpu is not None and gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu} is unknown: choose among {', '.join(GPUS)}.")
    read = load_recipe(path, overrides or ())
    device = device_at_hand(bool(read.training.get("bf16"))) if gpu is None else GPUS[gpu.lower()]
    found = run(
        read, device, num_gpus, beside=path.parent,
        utilization=utilization, num_text_tokens=num_text_tokens, num_labels=num_labels,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console.print(plan_table(found))
    for remark in found["remarks"]:
        console.print(f"* {remark}", highlight=False, markup=False)


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, out_folder("Run directory; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would train, for how long, and on what.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train by a recipe: stage pretrain (vision LoRA) or finetune (everything)."""
    from vora.train.packaged import find_recipe

    path = find_recipe(recipe)
    with starting():
        from vora.train import estimate
        from vora.train.recipe import load_recipe
        from vora.train.run import train as run

    goes_on = resume and (path.parent / "versions.json").exists()  # named by the recipe that the run keeps
    out, read = out or (path.parent if goes_on else Path("runs") / path.stem), load_recipe(path, overrides or ())
    if dry_run:
        estimate.dry_run(read, out, resume, path.parent, console)
        return
    estimate.print_estimate(read, path.parent, console, estimate.check_start(read, out, resume))
    run(read, out, resume=resume, console=console)
    console.print(f"Done: {out / 'report.md'}. Next: vora merge {shlex.quote(str(out))} -o OUT")
    if read.data.validation is not None and read.data.validation.share is not None:
        asked = shlex.join(["--held-out-by", str(out), *data_of_one_source(read.data), "-o", "probe.json"])
        console.print(f"Does it look, at what was held out? vora eval -m OUT --task probe {asked}")


def data_of_one_source(data: "DataSection") -> list[str]:
    """How `vora eval` is told to read the source of a recipe, where it is the only one."""
    if len(data.sources) > 1:
        return ["--data", "ONE_OF_ITS_SOURCES"]
    source, path = data.sources[0], Path(data.folder or "", data.sources[0].path)
    options = {"--image-folder": source.image_folder, "--subset": source.subset}
    options |= {} if path.is_file() else {"--split": source.split}
    words = [word for option, value in options.items() if value for word in (option, value)]
    words += [f"--column={ours}={theirs}" for ours, theirs in (source.columns or {}).items()]
    words += ["--allow-urls"] if data.allow_urls else []
    return ["--data", str(path) if path.exists() else source.path, *words]


@app.command()
def ablate(
    spec: Annotated[
        str,
        Argument(
            metavar="SPEC",
            help="YAML file of variants and seeds, or one of the package such as easy-vqa/ablations/mask.",
            autocompletion=names_of_specifications,
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, out_folder("For runs, table and curves; runs/SPEC by default.")] = None,
    seeds: Annotated[str | None, Option(metavar="N,N,...", help="Instead of the specification's.")] = None,
    variants: Annotated[str | None, Option(metavar="NAME,NAME,...", help="Only these.")] = None,
    max_samples: Annotated[
        int | None, Option(min=1, help="Train each run on so many at most, and measure it on so many.")
    ] = None,
) -> None:
    """Train a grid of variants and seeds and draw table and curves; the same command goes on after a stop."""
    from vora.train.packaged import find_recipe

    path = find_recipe(spec)
    with starting():
        from vora.ablate.page import console_table
        from vora.ablate.run import ablate as run
        from vora.ablate.run import num_failed

    out = out or Path("runs") / path.stem
    found = run(path, out, overrides or (), console, listed(seeds), listed(variants), max_samples)
    console.print(console_table(found, console.width))
    for warning in found["warnings"]:
        console.print(f"* {warning}", highlight=False)
    console.print(f"Table: {out / 'table.md'}, curves: {out / 'curves.png'}", highlight=False)
    if failed := num_failed(found):
        raise ValueError(f"{failed} runs failed; {out / 'table.md'} says why. The same command tries them again.")
