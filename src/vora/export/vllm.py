"""vLLM as an engine of `vora verify`: its Transformers backend, on a merged folder as it is.

vLLM wants libraries of its own, so that it runs in a process of another Python: VORA_VLLM_PYTHON names it.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vora.export.prompts import Prompt
from vora.export.runtimes import NUM_LOG_PROBS, Reading

PYTHON = "VORA_VLLM_PYTHON"
SCRIPT = Path(__file__).with_name("read_in_vllm.py")


def check_vllm() -> None:
    """Raise ValueError where there is no Python that may have vLLM."""
    python = os.environ.get(PYTHON)
    if (find_spec("vllm") is None) if python is None else (shutil.which(python) is None):
        missing = "vLLM is not installed here" if python is None else f"{PYTHON}={python} is no program"
        raise ValueError(f"{missing}: {PYTHON} names the Python of an environment that has it.")


class Vllm:
    """vLLM, which is given the tokens that torch reads; it shows the likeliest at each place, images included."""

    name, writes = "vllm", False

    def __init__(self, folder: Path, image_token_id: int) -> None:
        self.folder, self.image_token_id, self.version = folder, image_token_id, ""

    def read(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[Reading]:
        with TemporaryDirectory() as scratch:
            images = [Path(scratch, f"{number}.png") for number in range(len(prompts))]
            for image, prompt in zip(images, prompts):
                prompt.image.save(image)
            longest = max(prompt.length + len(answer) for prompt, answer in zip(prompts, answers)) + 1
            asked = {
                "prompts": [self._with_one_token(*pair) for pair in zip(prompts, answers)],
                "images": list(map(str, images)), "longest": longest, "num_log_probs": NUM_LOG_PROBS,
            }  # fmt: skip
            given, written = Path(scratch, "given.json"), Path(scratch, "written.json")
            given.write_text(json.dumps(asked))
            # isolated, so that no folder of ours is where it looks for modules
            command = [os.environ.get(PYTHON, sys.executable), "-I", SCRIPT, self.folder, given, written]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
            environment |= {"VLLM_NO_USAGE_STATS": "1"}
            found = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
            if found.returncode or not written.exists():
                lines = [line for line in found.stderr.splitlines() if "Error" in line] or ["no message"]
                raise ValueError(
                    f"vLLM does not read {self.folder}: {lines[-1]}. {PYTHON} names the Python of an environment "
                    "that has it."
                )
            outputs = json.loads(written.read_text())
        self.version = outputs["version"]
        readings = []
        for prompt, answer, output in zip(prompts, answers, outputs["prompts"]):
            table = torch.tensor(output["likeliest"], dtype=torch.float64)
            length = output["num_tokens"] - len(answer)
            places = list(range(len(table)))
            readings.append(Reading(answer, length, places, table[:, :, 1].long(), table[:, :, 0].float()))
        return readings

    def _with_one_token(self, prompt: Prompt, answer: list[int]) -> list[int]:
        """Its tokens and those of an answer, with one image token, which vLLM repeats itself."""
        ids, first = prompt.inputs["input_ids"][0].tolist(), prompt.first_image_token
        return [*ids[: first + 1], *(id for id in ids[first + 1 :] if id != self.image_token_id), *answer]
