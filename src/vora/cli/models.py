"""Verbs that write a model."""

import shlex
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from vora.cli.app import app, console
from vora.cli.options import BaseLlm, RemoteCode, also_folder, out_folder


@app.command()
def merge(
    path: Annotated[
        str, Argument(metavar="RUN", help="Run of `vora train`, a checkpoint of it, unmerged model or adapter.")
    ],
    out: Annotated[Path, out_folder("Folder for the merged model.")],
    llm_out: Annotated[Path | None, also_folder("Also write the LLM alone, in its own format.")] = None,
    adapter_out: Annotated[Path | None, also_folder("Also write the vision adapter alone.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Fold vision LoRA into the LLM's weights and save an ordinary model."""
    from vora.checkpoint.run_directory import best_checkpoint, run_of
    from vora.checkpoint.save import merge as run

    if run_of(Path(path)) == Path(path) and (best := best_checkpoint(Path(path))):
        text = f"Merging {best.folder}, the best by {best.metric} ({best.value:.4f}); for another, name its folder."
        console.print(text, highlight=False, markup=False)
    run(path, out, llm_out=llm_out, adapter_out=adapter_out, llm=llm)
    beside = [f"{what} in {place}" for what, place in (("LLM", llm_out), ("adapter", adapter_out)) if place]
    also, command = "".join(f", the {one}" for one in beside), f"vora chat IMAGE -m {shlex.quote(str(out))}"
    console.print(f"Saved {out}{also}. Ask it: {command}")


@app.command()
def import_reference(
    checkpoint: Annotated[str, Argument(help="Folder or hub id of a checkpoint of the paper's code.")],
    llm: Annotated[str, Option(help="The LLM it was made from: folder (config.json is enough) or hub id.")],
    out: Annotated[Path, out_folder("Folder for the model.")],
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
    ask = f"Ask it: vora chat IMAGE -m {shlex.quote(str(out))}"
    then = ask if can_chat else "--llm has no tokenizer, so it cannot chat."
    console.print(f"Saved {out}: the text architecture is {reference.model.config.text_config.model_type}. {then}")
