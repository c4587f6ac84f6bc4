"""A training that diverges: found before anything of it is saved, and the samples that it diverged on are named."""

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, NoReturn

import torch

from vora.checkpoint.run_directory import newest_checkpoint
from vora.data.streams import Streams

MOST_REMEMBERED = 4096  # micro-batches between two looks at the losses


class Divergence:
    """Remembers each micro-batch since the host last looked at the losses: its step, its loss, still on the device,
    and the places of its samples. Only `num_bad` asked for its value, and `stop`, wait for the device."""

    def __init__(self, sequences: Streams, directory: Path, process: int) -> None:
        self.sequences, self.directory, self.process = sequences, directory, process
        self.file = directory / "diverged.jsonl"
        self._recent: deque[tuple[int, torch.Tensor, list[list[int]]]] = deque(maxlen=MOST_REMEMBERED)

    def note(self, step: int, loss: torch.Tensor, places: list[list[int]]) -> None:
        """Remember a micro-batch."""
        self._recent.append((step, loss.detach(), places))

    def note_again(self, loss: torch.Tensor) -> None:
        """Remember the loss that the last micro-batch has after its step."""
        self.note(self._recent[-1][0], loss, self._recent[-1][2])

    def num_bad(self, model: Any, device: torch.device) -> torch.Tensor:
        """How many of the trained weights (with the moments beside them) and of the losses since the last look are not
        finite: int[2], on the device."""
        weights: list[torch.Tensor] = [weight for weight in model.parameters() if weight.requires_grad]
        weights += [] if model.distillation is None else [*model.distillation.buffers()]
        losses = [loss for _, loss, _ in self._recent]
        good = torch.ones((), dtype=torch.bool, device=device)  # so that none is empty
        kinds = [[torch.isfinite(_own_part(weight)).all() for weight in weights], [*map(torch.isfinite, losses)]]
        return torch.stack([len(kind) - torch.stack([*kind, good]).sum() + 1 for kind in kinds])

    def forget(self) -> None:
        """The losses are good: of the last step alone it may still be asked what it learned from."""
        last = self._recent[-1][0] if self._recent else 0
        self._recent = deque([one for one in self._recent if one[0] == last], MOST_REMEMBERED)

    def stop(self, cause: str) -> NoReturn:
        """Name the samples of the first step whose loss is not finite, or else of the last one, and raise."""
        found = [(step, float(loss), places) for step, loss, places in self._recent]
        bad = [one for one in found if not math.isfinite(one[1])]
        step = bad[0][0] if bad else found[-1][0] if found else None
        with self.file.open("a") as file:
            for at, loss, places in bad or found:
                if at == step:
                    names = [self.sequences.name_of(place) for place in places]
                    line = {"step": step, "process": self.process, "loss": str(loss), "samples": names}
                    file.write(json.dumps(line) + "\n")
        newest = newest_checkpoint(self.directory)
        cure = "No checkpoint was saved before" if newest is None else f"--resume goes on from {Path(newest).name}"
        raise FloatingPointError(
            f"{cause}: training diverged, and nothing of it was saved. Lower training.learning_rate, lengthen "
            f"training.warmup_steps, or train in bfloat16 or float32. {cure}; {self.file} names the samples."
        )


def _own_part(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor that FSDP spreads over processes, what this one has."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
