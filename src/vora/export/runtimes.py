"""Engines that a model is compared in: each reads prompts and says how likely it finds which tokens.

Dims: T tokens of prompt and answer, L places, K tokens at each, V vocabulary.
"""

import base64
import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from vora.export.gguf_files import MMPROJ, MODEL, GgufExport
from vora.export.prompts import Prompt

NUM_LOG_PROBS = 50  # likeliest tokens that llama.cpp is asked for at each place


@dataclass
class Reading:
    """What an engine made of a prompt: its answer, and how likely it found tokens at some places."""

    answer: list[int]
    num_prompt_tokens: int
    places: list[int]  # the log-probabilities of a place are of the token after it
    ids: Tensor  # int[L, K]
    log_probs: Tensor  # float[L, K]


class Runtime(Protocol):
    """An engine. Its readings of prompts come in order; `answers` are tokens to read after them, if it writes none."""

    name: str
    version: str
    writes: bool  # answers of its own

    def read(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[Reading]: ...


class RemoteCode:
    """transformers with the code that a merged folder brings."""

    name, writes = "remote-code", False

    def __init__(self, folder: Path) -> None:
        import transformers

        self.folder, self.version = folder, transformers.__version__

    def read(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[Reading]:
        tensors: dict[str, Tensor] = {}
        for number, (prompt, answer) in enumerate(zip(prompts, answers)):
            inputs = {**prompt.inputs, "input_ids": with_answer(prompt, answer)}
            tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in inputs.items()}
        with TemporaryDirectory() as scratch:
            given, written = f"{scratch}/inputs", f"{scratch}/outputs"
            save_file(tensors, given)
            script = Path(__file__).with_name("remote_code.py")
            # isolated, so that no folder of ours is where it looks for modules
            command = [sys.executable, "-I", script, self.folder, given, written]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
            found = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
            if found.returncode:
                last = (found.stderr.strip().splitlines() or ["no message"])[-1]
                raise ValueError(f"{self.folder} does not run with its own code: {last}")
            outputs = load_file(written)
        readings = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers)):
            log_probs = outputs[str(number)]
            ids = torch.arange(log_probs.shape[1]).expand_as(log_probs)
            readings.append(Reading(answer, prompt.length, list(range(len(log_probs))), ids, log_probs))
        return readings


def check_llama_cpp() -> None:
    """Raise ValueError where llama.cpp is not installed."""
    if find_spec("xllamacpp") is None:
        raise ValueError("llama.cpp is not installed: pip install 'vora-vlm[llamacpp]'.")


def llama_cpp_server(export: GgufExport, context: int, num_slots: int = 1, is_exact: bool = False) -> Any:
    """llama.cpp's server on an export, inside this process, with slots that hold `context` tokens each; `is_exact`
    keeps them in f32 as torch does, in twice the memory. ValueError where it is not installed."""
    check_llama_cpp()
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.mmproj.path = str(export.folder / MODEL), str(export.folder / MMPROJ)
    params.n_ctx, params.n_parallel = num_slots * context, num_slots
    params.n_batch = params.n_ubatch = export.batch_size
    params.image_min_tokens, params.image_max_tokens = export.min_image_tokens or -1, export.num_image_tokens
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    if is_exact:  # flash attention rounds to f16 what is f32 in the cache
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.verbosity = False, -1
    end_idle_threads()
    with _silence():
        return xllamacpp.Server(params)


def end_idle_threads() -> None:
    """End the OpenMP threads that torch keeps for this thread; they start again when torch needs them.

    torch and llama.cpp share libgomp. While it holds more threads than there are cores, idle ones too, it puts each
    waiting thread to sleep almost at once (its manual, GOMP_SPINCOUNT), and llama.cpp takes up to twice as long for a
    token."""
    with suppress(OSError, AttributeError):  # another OpenMP, or none: no such rule
        ctypes.CDLL("libgomp.so.1").omp_pause_resource_all(1)  # omp_pause_soft


class LlamaCpp:
    """llama.cpp's server, inside this process, on its road of chats with images; it answers greedily."""

    name, writes = "llama.cpp", True

    def __init__(self, export: GgufExport, context: int, max_new_tokens: int) -> None:
        self.server, self.version = llama_cpp_server(export, context, is_exact=True), version("xllamacpp")
        self.max_new_tokens = max_new_tokens

    def read(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[Reading]:
        return [self._read(prompt) for prompt in prompts]

    def _read(self, prompt: Prompt) -> Reading:
        image = {"type": "image_url", "image_url": {"url": as_url(prompt.image)}}
        content = [image, {"type": "text", "text": prompt.question}]
        request = {
            "messages": [{"role": "user", "content": content}], "max_tokens": self.max_new_tokens, "temperature": 0,
            "logprobs": True, "top_logprobs": NUM_LOG_PROBS, "cache_prompt": False,
            "return_tokens": True, "verbose": True,
        }  # fmt: skip
        found: dict[str, Any] = self.server.handle_chat_completions(request)
        if "choices" not in found:
            raise ValueError(f"llama.cpp refuses the prompt: {found}")
        listed = found["choices"][0]["logprobs"]["content"]
        # what begins a letter of several tokens is not listed; where the first of them is missing, places end
        pairs = takewhile(lambda pair: pair[0] == pair[1]["id"], zip(found["__verbose"]["tokens"], listed))
        answer = [id for id, _ in pairs]
        if not answer:
            raise ValueError("llama.cpp shows no token of its answer: give other --images, or more --max-new-tokens.")
        tops = [token["top_logprobs"] for token in listed[: len(answer)]]
        first = prompt.length - 1
        return Reading(
            answer,
            found["usage"]["prompt_tokens"],
            list(range(first, first + len(answer))),
            torch.tensor([[one["id"] for one in top] for top in tops]),
            torch.tensor([[one["logprob"] for one in top] for top in tops]),
        )


def with_answer(prompt: Prompt, answer: list[int]) -> Tensor:
    """int[1, T]"""
    return torch.cat([prompt.inputs["input_ids"], torch.tensor([answer], dtype=torch.long)], 1)


def as_url(image: Image.Image) -> str:
    """A data URL of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what a C library prints while it loads off the terminal."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)
