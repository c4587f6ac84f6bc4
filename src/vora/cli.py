"""The command line: one verb, one function. Heavy imports wait until a verb needs them."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from typer import Argument, Option
from typer.models import OptionInfo

from vora import __version__
from vora.cpu_threads import configure_cpu_threads

app = typer.Typer(
    name="vora",
    help="Vision as LoRA: language models learn to see without a vision encoder.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)
log = logging.getLogger("vora")

RecipeArgument = Annotated[Path, Argument(help="YAML file; see recipes/.")]
Overrides = Annotated[list[str] | None, Argument(help="key=value, such as training.max_steps=100.")]
ModelOption = Annotated[str | None, Option("--model", "-m", help="Folder or hub id of a model, or run directory.")]
MinImageTokens = Annotated[int | None, Option(help="Fewest tokens of an image; the model's own by default.")]
MaxImageTokens = Annotated[int | None, Option(help="Most tokens of an image; the model's own by default.")]
BaseLlm = Annotated[str | None, Option("--llm", help="Base LLM of an adapter that does not name it.")]


def _trust(wanted: bool) -> None:
    if wanted:
        from vora.build.hub import trust_remote_code

        trust_remote_code()


RemoteCode = Annotated[
    bool, Option("--trust-remote-code", callback=_trust, help="Run code that lies beside models; read it first.")
]


def out_option(help: str) -> OptionInfo:
    return Option("--out", "-o", help=help)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vora {__version__}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")
    ] = False,
    verbose: Annotated[bool, Option("--verbose", "-v", help="Also messages of libraries, and tracebacks.")] = False,
    quiet: Annotated[bool, Option("--quiet", "-q", help="Errors only.")] = False,
) -> None:
    """Set how much is printed."""
    level = logging.INFO if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s")
    if verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "info"
        warnings.simplefilter("default")
    console.quiet = quiet


@app.command()
def quickstart(
    overrides: Overrides = None,
    out: Annotated[Path, out_option("For result.json, report.html and the model.")] = Path("vora-quickstart"),
    llm: Annotated[str, Option(help="LLM to train: alias, folder or hub id.")] = "smollm2-135m",
    minutes: Annotated[float, Option(help="For everything; training is planned to fit.")] = 13.0,
    seed: Annotated[int, Option(help="Seed of data order and fresh weights.")] = 0,
) -> None:
    """Teach a small LLM to see in a quarter of an hour on two CPU cores: train, merge, measure, report."""
    from vora.quickstart.run import run_quickstart

    run_quickstart(out, llm=llm, minutes=minutes, seed=seed, overrides=overrides or (), console=console)


@app.command()
def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path, out_option("For summary.json, samples.html, bad_samples.jsonl.")] = Path("vora-data"),
    show: Annotated[int, Option(help="Samples on the page.")] = 20,
    max_samples: Annotated[int | None, Option(help="Only the first rows of each source.")] = None,
    workers: Annotated[int, Option(help="Worker processes; 0 reads in this one.")] = 2,
) -> None:
    """Read a recipe's data before training: what is in it, what is bad, how it packs, and how it looks."""
    from vora.train.preview import preview
    from vora.train.recipe import load_recipe

    summary = preview(load_recipe(recipe, overrides or ()), out, show, max_samples, workers, console)
    if not summary["num_samples"]:
        raise ValueError(f"All {summary['num_bad']} samples are bad: {out / 'bad_samples.jsonl'} says why.")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, out_option("Run directory; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the newest checkpoint of the run.")] = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Train by a recipe: stage pretrain (vision LoRA) or finetune (everything)."""
    from vora.train.recipe import load_recipe
    from vora.train.run import train as run

    out = out or Path("runs") / recipe.stem
    run(load_recipe(recipe, overrides or ()), out, resume=resume, console=console)
    console.print(f"Done: {out / 'report.md'}. Next: vora merge {out} -o OUT")


@app.command()
def ablate(
    spec: Annotated[Path, Argument(help="YAML file of variants and seeds; see recipes/*/ablations/.")],
    overrides: Overrides = None,
    out: Annotated[Path | None, out_option("For runs, table and curves; runs/SPEC by default.")] = None,
) -> None:
    """Train a grid of variants and seeds and draw table and curves; the same command goes on after a stop."""
    from vora.ablate.run import ablate as run
    from vora.ablate.run import num_failed

    out = out or Path("runs") / spec.stem
    found = run(spec, out, overrides or (), console)
    for warning in found["warnings"]:
        console.print(f"* {warning}", highlight=False)
    console.print(f"Table: {out / 'table.md'}, curves: {out / 'curves.png'}", highlight=False)
    if failed := num_failed(found):
        raise ValueError(f"{failed} runs failed; {out / 'table.md'} says why. The same command tries them again.")


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Annotated[str | None, Option(help="Such as h200 or l4; by default this machine.")] = None,
    num_gpus: Annotated[int, Option(min=1, help="How many, in machines of 8.")] = 1,
    utilization: Annotated[float, Option(min=0.01, max=1, help="Assumed share of the peak FLOP/s.")] = 0.4,
    num_text_tokens: Annotated[int, Option(min=2, help="Text tokens of a sample, if the data is not here.")] = 150,
    num_labels: Annotated[int, Option(min=1, help="Those of them with a label.")] = 100,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a run will need: parameters, FLOPs, memory, disk, hours, and what bounds it."""
    import json

    from vora.train.plan.device import GPUS, device_at_hand
    from vora.train.plan.plan import plan as run
    from vora.train.plan.plan import tables
    from vora.train.recipe import load_recipe

    if gpu is not None and gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu} is unknown: choose among {', '.join(GPUS)}.")
    read = load_recipe(recipe, overrides or ())
    device = device_at_hand(bool(read.training.get("bf16"))) if gpu is None else GPUS[gpu.lower()]
    found = run(
        read, device, num_gpus, beside=recipe.parent,
        utilization=utilization, num_text_tokens=num_text_tokens, num_labels=num_labels,
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console.print(tables(found))
    for remark in found["remarks"]:
        console.print(f"* {remark}", highlight=False, markup=False)


@app.command(name="eval")
def evaluate(
    task: Annotated[str, Option(help="captions, vqa, exact, classify, statements, probe (does it look?), text.")],
    data: Annotated[list[str], Option(help="Files, folders or datasets: all that recipes read; see `vora data`.")],
    out: Annotated[Path, out_option("JSON file of the report.")],
    more_data: Annotated[list[str] | None, Argument(metavar="[PATH]...", help="More data.")] = None,
    model: ModelOption = None,
    prompt: Annotated[str | None, Option(help="Instead of the task's own; {} takes a row's text.")] = None,
    labels: Annotated[Path | None, Option(help="Names of all classes, one per line.")] = None,
    column: Annotated[list[str] | None, Option(help="ours=theirs, such as captions=alt_text.")] = None,
    split: Annotated[str | None, Option(help="By default test, else validation, else train.")] = None,
    subset: Annotated[str | None, Option(help="Of a dataset on the Hub.")] = None,
    image_folder: Annotated[Path | None, Option(help="Where paths of images start.")] = None,
    allow_urls: Annotated[bool, Option("--allow-urls", help="Fetch images that rows name by URL.")] = False,
    max_examples: Annotated[int | None, Option(min=1, help="Only the first examples.")] = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    seed: Annotated[int, Option(help="Of intervals and of what a probe shows.")] = 0,
    of: Annotated[str | None, Option(help="The probed task; by default the one that the columns fit.")] = None,
    generate: Annotated[bool, Option("--generate", help="A probe also generates answers; slow.")] = False,
    against: Annotated[str | None, Option(help="What else a probe shows: other,blank,shuffled,none.")] = None,
    base: Annotated[str | None, Option(help="LLM that --task text compares with; else the model's own.")] = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Measure a model on a task, with 95 % intervals; the same command goes on after a stop."""
    from vora.checkpoint.pretrained import committed_model
    from vora.eval.run import evaluate as run

    if wrong := [pair for pair in column or () if "=" not in pair]:
        raise ValueError(f"--column {wrong[0]} is not of the form ours=theirs, such as captions=alt_text.")
    names = None if labels is None else [line.strip() for line in labels.read_text().splitlines() if line.strip()]
    columns = dict(pair.split("=", 1) for pair in column or ()) or None
    report = run(
        model or committed_model(), task, [*data, *(more_data or ())], out,
        split=split, subset=subset, image_folder=image_folder, allow_urls=allow_urls, columns=columns,
        min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens, max_examples=max_examples, seed=seed,
        prompt=prompt, labels=names, of=of, generate=generate, against=against and against.split(","), base=base,
        console=console,
    )  # fmt: skip
    console.print(report.table())
    if "verdict" in report.details:
        console.print(report.details["verdict"], highlight=False, markup=False)
    console.print(f"Report: {out}")


@app.command()
def merge(
    path: Annotated[
        str,
        Argument(metavar="RUN", help="Run of `vora train`, a checkpoint of it, unmerged model or adapter."),
    ],
    out: Annotated[Path, out_option("Folder for the merged model.")],
    llm_out: Annotated[Path | None, Option(help="Also write the LLM alone, in its own format.")] = None,
    adapter_out: Annotated[Path | None, Option(help="Also write the vision adapter alone.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fold vision LoRA into the LLM's weights and save an ordinary model."""
    from vora.checkpoint.run_directory import best_checkpoint, run_of
    from vora.checkpoint.save import merge as run

    if run_of(Path(path)) == Path(path) and (best := best_checkpoint(Path(path))):
        text = f"Merging {best.folder}, the best by {best.metric} ({best.value:.4f}); for another, name its folder."
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    run(path, out, llm_out=llm_out, adapter_out=adapter_out, llm=llm)
    console.print(f"Saved {out}. Ask it: vora chat IMAGE -m {out}")


@app.command()
def import_reference(
    checkpoint: Annotated[str, Argument(help="Folder or hub id of a checkpoint of the paper's code.")],
    llm: Annotated[str, Option(help="The LLM it was made from: folder (config.json is enough) or hub id.")],
    out: Annotated[Path, out_option("Folder for the model.")],
    merge: Annotated[bool, Option("--merge", help="Fold a stage-1 checkpoint's LoRA into the weights.")] = False,
) -> None:
    """Convert a checkpoint of the paper's released code, stage 1 or merged; its outputs stay the same."""
    from rich.table import Table

    from vora.checkpoint.reference import import_reference as run

    reference = run(checkpoint, llm, out, merge)
    table = Table("part", "tensors", "parameters", title="Where its tensors went")
    for place, (count, size) in reference.places.items():
        table.add_row(place, f"{count:,}", f"{size:,}")
    console.print(table)
    can_chat = (out / "processor_config.json").exists()
    then = f"Ask it: vora chat IMAGE -m {out}" if can_chat else "--llm has no tokenizer, so it cannot chat."
    console.print(f"Saved {out}: the text architecture is {reference.model.config.text_config.model_type}. {then}")


@app.command()
def chat(
    images: Annotated[list[str] | None, Argument(metavar="[IMAGE]...", help="Paths or URLs.")] = None,
    model: ModelOption = None,
    question: Annotated[str | None, Option("--question", "-q", help="Ask once instead of chatting.")] = None,
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, Option(help="0 answers greedily.")] = 0.0,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Ask a model about images; without -q, interactively (`/help` shows what a line may be, an empty one ends)."""
    from vora.checkpoint.load import load_model
    from vora.checkpoint.pretrained import committed_model
    from vora.serve.chat import Chat
    from vora.serve.engine import Engine
    from vora.serve.terminal import NO_IMAGE, converse, open_image, print_answer

    opened = [open_image(image) for image in images or []]
    name = model or committed_model()
    loaded = load_model(name, llm=llm, min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens)
    conversation = Chat(Engine(*loaded), max_new_tokens, temperature)
    if question is None:
        converse(conversation, opened, console)
        return
    if not opened:
        console.print(f"{NO_IMAGE}: vora chat IMAGE -q QUESTION gives one.", highlight=False)
    print_answer(conversation, question, opened)


@app.command()
def inspect(
    image: Annotated[str, Argument(help="Path or URL.")],
    model: ModelOption = None,
    question: Annotated[str, Option("--question", "-q", help="What to ask.")] = "Describe the image.",
    answer: Annotated[str | None, Option(help="Answer to follow; the model's own by default.")] = None,
    teacher: Annotated[str | None, Option(help="ViT to compare with: folder or hub id; else the run's own.")] = None,
    out: Annotated[Path, out_option("HTML page; its figures go beside it as JSON.")] = Path("inspect.html"),
    max_new_tokens: Annotated[int, Option(help="Longest answer, in tokens.")] = 64,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Draw how a model sees an image: its blocks beside the teacher's, and where each word of the answer looks."""
    from vora.checkpoint.layout import read_info
    from vora.checkpoint.load import load_model
    from vora.checkpoint.pretrained import committed_model
    from vora.distill.objective import Objective
    from vora.eval.inspect.inspection import inspect_image
    from vora.eval.inspect.page import write_inspection
    from vora.eval.inspect.teacher import take_teacher
    from vora.model.fetch_image import fetch_image

    if out.suffix != ".html":
        raise ValueError(f"--out {out} names no page: give a name that ends in .html; a JSON goes beside it.")
    figures = out.with_suffix(".json")
    if figures.exists() and not out.exists():
        raise ValueError(f"{figures} is there and no page's: choose another --out, so that it is not overwritten.")
    shown, name = fetch_image(image, allow_urls=True), model or committed_model()
    dtype = "float32" if read_info(name).run else None  # a run's trained parts are in float32
    vora, processor = load_model(
        name, llm=llm, min_image_tokens=min_image_tokens, max_image_tokens=max_image_tokens, dtype=dtype
    )
    objective = Objective(vora, processor.image_processor)
    pairs, remark = take_teacher(objective, name, teacher)
    found = inspect_image(objective, processor, shown, question, answer, pairs, max_new_tokens)
    write_inspection(out, found, processor.image_processor, image, name, [remark] if remark else [])
    if remark:
        console.print(remark, highlight=False, markup=False)
    console.print(f"{found.answer}\nPage: {out}", highlight=False, markup=False)


def main() -> None:
    """Run the command line; whatever goes wrong is one line with cause and cure."""
    configure_cpu_threads()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, about names that users never wrote
    try:
        app()
    except InterruptedError as stop:
        _print_error(escape(str(stop)), 130)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        log.info("Traceback of the error:", exc_info=True)
        known = isinstance(error, (ValueError, OSError, ArithmeticError))
        message = " ".join(str(error).split())
        shown = message if known else f"{type(error).__name__}: {message} (vora --verbose shows where)"
        _print_error(f"[bold red]error:[/bold red] {escape(shown)}", 1)


def _print_error(message: str, status: int) -> NoReturn:
    console.quiet = False
    console.print(message, highlight=False)
    sys.exit(status)


if __name__ == "__main__":
    main()
