"""Verbs for other engines: export writes their files, verify compares them with torch."""

from pathlib import Path
from typing import Annotated

from typer import Option

from vora.cli.app import app, console
from vora.cli.options import BaseLlm, ModelOption, RemoteCode, out_folder


@app.command()
def export(
    out: Annotated[Path, out_folder("Folder for model.gguf, mmproj.gguf and Modelfile.")],
    model: ModelOption = None,
    to: Annotated[str, Option(help="gguf: for llama.cpp, Ollama and LM Studio.")] = "gguf",
    quant: Annotated[str, Option(help="Weights of the LLM: f32, f16, bf16 or q8_0.")] = "f16",
    image_size: Annotated[int | None, Option(help="Side of its images in pixels; the largest by default.")] = None,
    llama_cpp: Annotated[Path | None, Option(help="A clone of llama.cpp to convert with.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model in the format of another engine."""
    from vora.checkpoint.pretrained import committed_model
    from vora.export.gguf_files import export_gguf

    if to != "gguf":
        raise ValueError(f"--to {to} is unknown: give gguf.")
    found = export_gguf(
        model or committed_model(), out, quant=quant, image_size=image_size, llama_cpp=llama_cpp, llm=llm
    )
    console.print(found.summary(), highlight=False, markup=False)


@app.command()
def verify(
    runtime: Annotated[str, Option(help="Engine to compare with torch: remote-code or llama.cpp.")],
    model: ModelOption = None,
    images: Annotated[list[str] | None, Option(help="File or folder; by default three drawn images.")] = None,
    files: Annotated[Path | None, Option(help="Folder of `vora export`; else one is made in f32.")] = None,
    json: Annotated[Path | None, Option(help="File for the figures.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Prove that another engine computes what torch computes: log-probabilities of the same tokens, and attention."""
    from vora.checkpoint.pretrained import committed_model
    from vora.export.verify import verify as run

    found = run(model or committed_model(), runtime, images=images or (), files=files, llm=llm)
    if json is not None:
        found.write(json)
    console.print(found.summary(), highlight=False, markup=False)
    if found.failures:
        raise ValueError(" ".join(found.failures))
