"""`vora serve`: an engine behind the API, until it is told to stop."""

import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
import uvicorn
from transformers import GenerationConfig

from vora.checkpoint.layout import CheckpointInfo, read_info
from vora.checkpoint.load import load_model
from vora.serve.api.app import create_app
from vora.serve.api.service import Service
from vora.serve.engine import Engine
from vora.serve.heaps import share_heaps
from vora.serve.limits import Limits

ENGINES = ("auto", "transformers", "llama.cpp", "vllm")


def choose_engine(name: str, model: str, trust_remote_code: bool) -> str:
    """The engine that is meant. `auto` is vLLM where it and a GPU are here and it may run the model's folder, for it
    is the fastest there and computes the same; else transformers, which runs whatever `vora chat` runs, images of any
    size included. llama.cpp is for who asks for it: it has one square size of images and puts texts around them.
    ValueError for other names."""
    if name not in ENGINES:
        raise ValueError(f"--engine {name} is unknown: give {', '.join(ENGINES)}.")
    if name != "auto":
        return name
    can_vllm = find_spec("vllm") and torch.cuda.is_available() and trust_remote_code and _is_merged(read_info(model))
    return "vllm" if can_vllm else "transformers"


def _is_merged(info: CheckpointInfo) -> bool:
    return info.adapter is None and info.run is None


def default_name(model: str) -> str:
    """What a model is called unless the user says: the name of its folder, or its id on the hub."""
    path = Path(model)
    return path.resolve().name if path.exists() else model


def serving_dtype(device: str | None) -> torch.dtype | None:
    """float32 on a processor without products in bf16, else the model's own: where these are only imitated, a product
    of 16 rows takes 12 times as long as one of a single row, in float32 3 times (dev/LOG.md)."""
    on_cpu = device == "cpu" or (device is None and not torch.cuda.is_available())
    return torch.float32 if on_cpu and not torch.ops.mkldnn._is_mkldnn_bf16_supported() else None


def sampling_of(config: GenerationConfig) -> tuple[float, float]:
    """(temperature, top_p) of requests that give none: what came with the LLM, else OpenAI's."""
    temperature, top_p = (config.temperature, config.top_p) if config.do_sample else (None, None)
    return temperature or 1.0, top_p or 1.0


@contextmanager
def service(
    kind: str,
    model: str,
    name: str,
    limits: Limits,
    allow_urls: bool = False,
    *,
    quant: str | None = None,
    **loading: Any,
) -> Iterator[Service]:
    """A model in the engine `transformers` or `llama.cpp`; what that wrote goes at the end."""
    share_heaps()
    if kind == "llama.cpp":
        from vora.serve.llama_cpp import llama_cpp_engine

        with llama_cpp_engine(model, limits, quant or "f16", **loading) as llama_cpp:
            yield Service(llama_cpp, name, limits, allow_urls, *sampling_of(llama_cpp.generation_config))
        return
    if quant is not None:
        raise ValueError(f"--quant {quant} is of --engine llama.cpp: leave it out, or say --dtype.")
    loading["dtype"] = loading.get("dtype") or serving_dtype(loading.get("device"))
    loaded, processor = load_model(model, **loading)
    engine = Engine(
        loaded, processor, max_batch_size=limits.max_batch_size, max_prompt_tokens=limits.max_prompt_tokens,
        max_new_tokens=limits.max_tokens,
    )  # fmt: skip
    yield Service(engine, name, limits, allow_urls, *sampling_of(loaded.generation_config))


def run(service: Service, host: str, port: int, api_keys: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C; then nobody is let in, and running answers have `stop_seconds` to finish."""
    config = uvicorn.Config(
        create_app(service, api_keys), host=host, port=port, log_level="warning", access_log=False,
        timeout_graceful_shutdown=int(service.limits.stop_seconds), timeout_keep_alive=30, server_header=False,
    )  # fmt: skip
    leave_on_sigterm()  # uvicorn sends itself once more what stopped it: to be stopped so is no failure
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run()


def leave_on_sigterm() -> None:
    """From now on SIGTERM leaves in order: what was written for the time being goes."""

    def leave(*given: Any) -> NoReturn:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, leave)


def exec_vllm(
    model: str, name: str, limits: Limits, host: str, port: int, api_keys: Sequence[str], trust_remote_code: bool,
    dtype: str | None = None,
) -> NoReturn:  # fmt: skip
    """Become `vllm serve` on a merged folder. ValueError where vLLM, a GPU or such a folder is missing, or it is to
    ask for several keys."""
    command = shutil.which("vllm")
    if command is None or not torch.cuda.is_available():
        missing = "vLLM is not installed (pip install vllm)" if command is None else "no GPU is here"
        raise ValueError(f"{missing}: give --engine transformers, which runs anywhere.")
    info = read_info(model)
    if not _is_merged(info):
        raise ValueError(f"vLLM needs a merged model: vora merge {model} -o OUT, and serve OUT.")
    if not trust_remote_code:
        raise ValueError(f"vLLM runs the code that lies in {model}: read it, then add --trust-remote-code.")
    options = {
        "--served-model-name": name, "--host": host, "--port": port, "--max-num-seqs": limits.max_batch_size,
        "--limit-mm-per-prompt": f'{{"image": {limits.max_images}}}',
    }  # fmt: skip
    if len(api_keys) > 1:
        raise ValueError(f"vLLM asks for one key, and {len(api_keys)} are given: leave one, or --engine transformers.")
    options |= {} if dtype is None else {"--dtype": dtype}
    given = [str(word) for pair in options.items() for word in pair]
    if api_keys:
        os.environ["VLLM_API_KEY"] = api_keys[0]  # not on the command line, which other users can see
    os.execv(command, [command, "serve", str(info.path), "--trust-remote-code", *given])
