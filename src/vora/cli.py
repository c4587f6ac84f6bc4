"""The command line: one verb, one function. Heavy imports wait until a verb needs them."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    name="vora",
    help="Sight for language models without a vision encoder (Vision as LoRA).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True)

ModelOption = Annotated[str | None, typer.Option("--model", "-m", help="Folder or hub id of a VoRA model.")]


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option("--out", "-o", help="Where result.json, report.html and model go.")] = Path(
        "vora-quickstart"
    ),
    llm: Annotated[str, typer.Option(help="LLM that learns to see: alias, folder or hub id.")] = "smollm2-135m",
    minutes: Annotated[float, typer.Option(help="For the whole job; training is planned to fit.")] = 13.0,
    seed: Annotated[int, typer.Option(help="Seed of data order and fresh weights.")] = 0,
):
    """Give a small LLM eyes in a quarter of an hour on two CPU cores: train, merge, measure, report."""
    from vora.quickstart.run import run_quickstart

    run_quickstart(out, llm=llm, minutes=minutes, seed=seed, console=console)


@app.command()
def data(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as data.sequence_length=2048.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Gets summary.json, samples.html, bad_samples.jsonl.")
    ] = Path("vora-data"),
    show: Annotated[int, typer.Option(help="Samples on the page.")] = 20,
    max_samples: Annotated[int | None, typer.Option(help="Read the first so many rows of each source only.")] = None,
    workers: Annotated[int, typer.Option(help="Processes that read; 0 reads in this one.")] = 2,
):
    """Read a recipe's data before any training: what is in it, what is bad, how it packs, and how it looks."""
    from vora.train.preview import preview
    from vora.train.recipe import load_recipe

    summary = preview(load_recipe(recipe, overrides or ()), out, show, max_samples, workers, console)
    if not summary["num_samples"]:
        raise ValueError(f"All {summary['num_bad']} samples are bad: {out / 'bad_samples.jsonl'} says why.")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as training.max_steps=100.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run directory; runs/RECIPE by default.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
):
    """Train by a recipe: stage pretrain (vision LoRA) or finetune (everything)."""
    from vora.train.recipe import load_recipe
    from vora.train.run import train as run

    out = out or Path("runs") / recipe.stem
    run(load_recipe(recipe, overrides or ()), out, resume=resume, console=console)
    console.print(f"Done: {out / 'report.md'}. Next: vora merge {out} -o OUT")


@app.command()
def ablate(
    spec: Annotated[Path, typer.Argument(help="YAML file of variants and seeds; see recipes/*/ablations/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value of the recipe, for all variants, such as data.folder=FOLDER.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="For runs, table and curves; runs/SPEC by default.")
    ] = None,
):
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
    recipe: Annotated[Path, typer.Argument(help="YAML file; see recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as lora.rank=512.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Such as h200 or l4; by default this machine.")] = None,
    num_gpus: Annotated[int, typer.Option(min=1, help="How many, in machines of 8.")] = 1,
    utilization: Annotated[float, typer.Option(min=0.01, max=1, help="Assumed share of the peak FLOP/s.")] = 0.4,
    num_text_tokens: Annotated[
        int, typer.Option(min=2, help="Text tokens of a sample, if the data is not here.")
    ] = 150,
    num_labels: Annotated[int, typer.Option(min=1, help="Of these, those that are learned.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
):
    """What a run will need, before it starts: parameters, FLOPs, memory, disk, hours, and what bounds it."""
    import json

    from vora.train.plan.device import GPUS, device_at_hand
    from vora.train.plan.plan import plan as run
    from vora.train.plan.tables import tables
    from vora.train.recipe import load_recipe

    if gpu is not None and gpu.lower() not in GPUS:
        raise ValueError(f"--gpu {gpu} is unknown: choose among {', '.join(GPUS)}.")
    read = load_recipe(recipe, overrides or ())
    device = device_at_hand(bool(read.training.get("bf16"))) if gpu is None else GPUS[gpu.lower()]
    found = run(
        read,
        device,
        num_gpus,
        beside=recipe.parent,
        utilization=utilization,
        num_text_tokens=num_text_tokens,
        num_labels=num_labels,
    )
    if as_json:
        print(json.dumps(found, indent=1))
        return
    console.print(tables(found))
    for remark in found["remarks"]:
        console.print(f"* {remark}", highlight=False, markup=False)


@app.command(name="eval")
def evaluate(
    task: Annotated[
        str, typer.Option(help="captions, vqa, exact, classify, statements, probe (does it look?), text.")
    ],
    data: Annotated[
        list[str], typer.Option(help="Files, folders or datasets: all that recipes read; see `vora data`.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="JSON file of the report.")],
    more_data: Annotated[list[str] | None, typer.Argument(metavar="[PATH]...", help="More data.")] = None,
    model: ModelOption = None,
    prompt: Annotated[
        str | None, typer.Option(help="Instead of the task's own; {} is where a row's text goes.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="Names of all classes, one per line.")] = None,
    column: Annotated[list[str] | None, typer.Option(help="ours=theirs, such as captions=alt_text.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Of folders and datasets; test, else validation, else train.")
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Of a dataset on the Hub.")] = None,
    image_folder: Annotated[Path | None, typer.Option(help="Where paths of images start.")] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images that rows name by URL.")] = False,
    max_examples: Annotated[int | None, typer.Option(min=1, help="Ask the first so many only.")] = None,
    min_image_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of an image; the model's own.")] = None,
    max_image_tokens: Annotated[int | None, typer.Option(help="Most tokens of an image; the model's own.")] = None,
    seed: Annotated[int, typer.Option(help="Of intervals and of what a probe shows.")] = 0,
    of: Annotated[str | None, typer.Option(help="The task that a probe is of; told by the data's columns.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="A probe also lets the model speak; slow.")] = False,
    against: Annotated[
        str | None,
        typer.Option(help="What a probe shows besides the right image: other,blank,shuffled,none; other is fastest."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The LLM that --task text holds the model against; what its card names.")
    ] = None,
):
    """Measure a model on a task, with 95 % intervals; the same command goes on after a stop."""
    from vora.checkpoint.pretrained import committed_model
    from vora.eval.run import evaluate as run

    if wrong := [pair for pair in column or () if "=" not in pair]:
        raise ValueError(f"--column {wrong[0]} is not of the form ours=theirs, such as captions=alt_text.")
    names = None if labels is None else [line.strip() for line in labels.read_text().splitlines() if line.strip()]
    report = run(
        model or committed_model(),
        task,
        [*data, *(more_data or ())],
        out,
        split=split,
        subset=subset,
        image_folder=image_folder,
        allow_urls=allow_urls,
        columns=dict(pair.split("=", 1) for pair in column or ()) or None,
        min_image_tokens=min_image_tokens,
        max_image_tokens=max_image_tokens,
        console=console,
        of=of,
        against=None if against is None else against.split(","),
        generate=generate,
        base=base,
        prompt=prompt,
        labels=names,
        max_examples=max_examples,
        seed=seed,
    )
    console.print(report.table())
    if "verdict" in report.details:
        console.print(report.details["verdict"], highlight=False, markup=False)
    console.print(f"Report: {out}")


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Run directory of `vora train`, or an unmerged model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the merged model.")],
    llm_out: Annotated[Path | None, typer.Option(help="Also write the language part alone, as its stock LLM.")] = None,
    adapter_out: Annotated[
        Path | None, typer.Option(help="Also write what a run added to its LLM, without it.")
    ] = None,
    llm: Annotated[str | None, typer.Option(help="The LLM of eyes that come without one and do not name it.")] = None,
):
    """Fold vision LoRA into the LLM's weights and save an ordinary model."""
    from vora.train.trained import check_has_adapter, merge_run, write_adapter, write_run_card

    if adapter_out is not None:
        check_has_adapter(run)
    places = {
        name: path for name, path in (("--out", out), ("--llm-out", llm_out), ("--adapter-out", adapter_out)) if path
    }
    for name, path in places.items():
        if path.exists() and any(path.iterdir()):
            raise ValueError(f"{path} is not empty: choose another {name}, so that nothing is overwritten.")
    if len({path.resolve() for path in places.values()}) < len(places):
        raise ValueError(f"{', '.join(places)} name one folder twice: each needs its own.")
    model, processor = merge_run(run, llm)
    model.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    write_run_card(out, run)
    if llm_out is not None:
        model.to_llm().save_pretrained(llm_out)
        if hasattr(processor, "tokenizer"):
            processor.text_tokenizer().save_pretrained(llm_out)
        write_run_card(llm_out, run)
    if adapter_out is not None:
        write_adapter(adapter_out, run)
    console.print(f"Saved {out}. Ask it: vora chat IMAGE -m {out}")


@app.command()
def import_reference(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a checkpoint of the paper's code.")],
    llm: Annotated[str, typer.Option(help="The LLM it was made from: folder (config.json is enough) or hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model.")],
    merge: Annotated[bool, typer.Option("--merge", help="Fold a stage-1 checkpoint's LoRA into the weights.")] = False,
):
    """Bring a checkpoint of the paper's released code here, stage 1 or merged; it gives the same numbers."""
    from rich.table import Table

    from vora.checkpoint.card import CardFacts, write_card
    from vora.checkpoint.reference import import_reference as run

    reference = run(checkpoint, llm, out, merge)
    facts = CardFacts(
        made="imported",
        stage="pretrain" if reference.rank or merge else "not stated",
        base_llm=llm,
        teacher=reference.teacher or None,
        source=checkpoint,
        merge_command="vora merge THIS_FOLDER -o my-vora",
    )
    write_card(out, facts)
    table = Table(title="Where its tensors went")
    for name in ("part", "tensors", "parameters"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for place, (count, size) in reference.places.items():
        table.add_row(place, f"{count:,}", f"{size:,}")
    console.print(table)
    text_config = reference.model.config.text_config
    has_words = (out / "processor_config.json").exists()
    then = f"Ask it: vora chat IMAGE -m {out}" if has_words else "--llm has no tokenizer, so it cannot chat."
    console.print(f"Saved {out}: the text architecture is {text_config.model_type}. {then}")


@app.command()
def chat(
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Paths or URLs.")] = None,
    model: ModelOption = None,
    question: Annotated[str | None, typer.Option("--question", "-q", help="Ask once instead of chatting.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 answers greedily.")] = 0.0,
    min_image_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of an image; the model's own.")] = None,
    max_image_tokens: Annotated[int | None, typer.Option(help="Most tokens of an image; the model's own.")] = None,
):
    """Ask a model about images; without -q, interactively (a line `+ IMAGE` adds an image, empty ends)."""
    from vora.checkpoint.pretrained import committed_model
    from vora.serve.engine import Chat, load_model

    pending = [_image_or_animation(image) for image in images or []]
    loaded = load_model(model or committed_model(), min_image_tokens, max_image_tokens)
    conversation = Chat(*loaded, max_new_tokens, temperature)
    if question is not None:
        _print_answer(conversation, question, pending)
        return
    console.print(f"{len(pending)} images given. Ask away; `+ IMAGE` adds an image, an empty line ends.")
    while text := _read_line():
        try:
            if text.startswith("+"):
                pending.append(_image_or_animation(text[1:].strip()))
                continue
            _print_answer(conversation, text, pending)
        except ValueError as error:
            console.print(f"[red]{escape(str(error))}[/red]")
            if text.startswith("+") or not pending:
                continue
            console.print(f"{len(pending)} images were left out with that question: add them again with `+ IMAGE`.")
        pending = []


def _image_or_animation(source):
    """What a path or URL holds: an animation with all its frames if it is a file, of a URL the first one."""
    from vora.model.fetch_image import fetch_image, is_animated
    from vora.model.image_processing_vora import Video

    return Video(source) if is_animated(source) else fetch_image(source, allow_urls=True)


@app.command()
def inspect(
    image: Annotated[str, typer.Argument(help="Path or URL.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder or hub id of a VoRA model, or run directory.")
    ] = None,
    question: Annotated[str, typer.Option("--question", "-q", help="What to ask.")] = "Describe the image.",
    answer: Annotated[str | None, typer.Option(help="Answer to follow; the model's own by default.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="ViT to compare with: folder or hub id; by default the run's own.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Page; a JSON goes beside it.")] = Path("inspect.html"),
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 64,
    min_image_tokens: Annotated[int | None, typer.Option(help="Fewest tokens of an image; the model's own.")] = None,
    max_image_tokens: Annotated[int | None, typer.Option(help="Most tokens of an image; the model's own.")] = None,
):
    """Images of how a model sees one: its blocks beside the teacher's, and where each word of the answer looked."""
    from vora.checkpoint.pretrained import committed_model
    from vora.checkpoint.run_directory import trained_folder
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
    learner, processor = _opened(name, teacher, min_image_tokens, max_image_tokens)
    pairs, remark = take_teacher(learner, str(trained_folder(name)), teacher)
    found = inspect_image(learner, processor, shown, question, answer, pairs, max_new_tokens)
    write_inspection(out, found, processor.image_processor, image, name, [remark] if remark else [])
    if remark:
        console.print(remark, highlight=False, markup=False)
    console.print(f"{found.answer}\nPage: {out}", highlight=False, markup=False)


def _opened(name, teacher, min_image_tokens, max_image_tokens):
    """The learner around a model, or of a run, and its processor."""
    import torch

    from vora.checkpoint.run_directory import is_run
    from vora.distill.objective import Objective
    from vora.serve.engine import load_model
    from vora.train.trained import open_run

    if is_run(name):
        learner, processor = open_run(name, teacher)
        processor.image_processor.set_budget(min_image_tokens, max_image_tokens)
        return learner.to("cuda" if torch.cuda.is_available() else "cpu"), processor
    model, processor = load_model(name, min_image_tokens, max_image_tokens)
    return Objective(model, processor.image_processor), processor


def _print_answer(conversation, question, images):
    for piece in conversation.ask(question, images):
        print(piece, end="", flush=True)
    print(flush=True)


def _read_line():
    try:
        return input("> ").strip() if sys.stdin.isatty() else sys.stdin.readline().strip()
    except EOFError:
        return ""


def _quiet():
    """transformers has been imported by now, and has read its variables: what it says of deprecations, of heads that a
    teacher does not need, and of weights as they load is not for those who use a command."""
    import transformers

    level = os.environ["TRANSFORMERS_VERBOSITY"].upper()
    transformers.logging.set_verbosity(getattr(transformers.logging, level, transformers.logging.ERROR))
    transformers.logging.disable_progress_bar()


def main():
    """Run the command line; whatever goes wrong is one line with cause and cure (VORA_TRACEBACK=1 shows the rest)."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _quiet()
    warnings.filterwarnings("ignore", category=FutureWarning)  # between libraries, about names that users never wrote
    try:
        app()
    except InterruptedError as stop:
        console.print(str(stop), highlight=False, markup=False)
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if os.environ.get("VORA_TRACEBACK"):
            raise
        known = isinstance(error, (ValueError, OSError, ArithmeticError))
        name = "" if known else f"{type(error).__name__}: "
        tail = "" if known else " (VORA_TRACEBACK=1 shows where)"
        told = escape(f"{name}{' '.join(str(error).split())}{tail}")
        console.print(f"[bold red]error:[/bold red] {told}", highlight=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
