"""onnxruntime on what `vora export --to onnx` writes: the prompt at once, the answer token by token behind a cache.

Dims: T tokens, I image tokens, D LLM width, V vocabulary.
"""

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from vora.export.onnx_files import DECODER, EMBED, RUNS, VISION, OnnxExport, check_onnx
from vora.export.prompts import Prompt
from vora.export.runtimes import Reading


class Onnx:
    """onnxruntime on a processor."""

    name, writes = "onnx", False

    def __init__(self, export: OnnxExport) -> None:
        check_onnx(RUNS)
        import onnxruntime

        self.export, self.version = export, version("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.embed, self.vision, self.decoder = (
            onnxruntime.InferenceSession(str(export.folder / name), options) for name in (EMBED, VISION, DECODER)
        )

    def read(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[Reading]:
        return [self._read(prompt, answer) for prompt, answer in zip(prompts, answers)]

    def _read(self, prompt: Prompt, answer: list[int]) -> Reading:
        ids = prompt.inputs["input_ids"].numpy()
        (embeds,) = self.embed.run(None, {"input_ids": ids})
        is_image = ids == self.export.image_token_id
        (features,) = self.vision.run(None, {"pixel_values": pixels_of(prompt)})
        embeds[is_image] = features[0]
        logits, cache = self._decode(embeds, is_image.astype(np.int64) - 1, self._empty())
        found = [logits[0]]
        for id in answer:
            (embeds,) = self.embed.run(None, {"input_ids": np.array([[id]])})
            logits, cache = self._decode(embeds, np.array([[-1]]), cache)
            found.append(logits[0])
        log_probs = torch.from_numpy(np.concatenate(found)).log_softmax(-1)
        every = torch.arange(log_probs.shape[1]).expand_as(log_probs)
        return Reading(answer, prompt.length, list(range(len(log_probs))), every, log_probs)

    def _empty(self) -> list[np.ndarray]:
        """A cache of no tokens."""
        shapes = [one.shape for one in self.decoder.get_inputs()[2:]]
        return [np.zeros((1, heads, 0, width), np.float32) for _, heads, _, width in shapes]

    def _decode(self, embeds: np.ndarray, numbers: np.ndarray, cache: list[np.ndarray]) -> tuple[np.ndarray, list]:
        names = [one.name for one in self.decoder.get_inputs()]
        logits, *cache = self.decoder.run(None, dict(zip(names, [embeds, numbers, *cache])))
        return logits, cache


def pixels_of(prompt: Prompt) -> Any:
    """float[1, C, S, S] of a prompt's image, normalised, from its patches float[P, C*p*p]."""
    (_, rows, columns), patches = prompt.inputs["image_grid_thw"][0].tolist(), prompt.inputs["pixel_values"]
    side = prompt.image.height // rows
    pixels = patches.view(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
    return pixels.flatten(3).flatten(1, 2)[None].contiguous().numpy()
