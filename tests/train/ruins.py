"""Ruins steps of a small training in random ways and has it save: nothing that is not finite may reach the disk.

PYTHONPATH=src:tests:tests/train python tests/train/ruins.py --steps 10000 --out FOLDER
"""

import argparse
import random
import shutil
from collections import Counter
from pathlib import Path

import kills
import torch
from runs import run
from safetensors.torch import load_file

from vora.train.recipe import load_recipe
from vora.train.trainer import VoraTrainer

VALUES = (float("nan"), float("inf"), float("-inf"))


class Ruins:
    """A training after its last step, whose state is put back before each step that is ruined."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        few = ["training.max_steps=2", "teacher.distill_only_steps=1", "training.save_steps=100"]
        few += ["teacher.standardize=true"]
        self.folder, self.rng, self.found = folder / "run", random.Random(seed), Counter[str]()
        self.trainer: VoraTrainer = run(load_recipe(kills.write_recipe(folder / "data"), few), self.folder)
        objective = self.trainer.model.train()
        self.trained = [p for p in objective.parameters() if p.requires_grad]
        self.moments = [b for b in objective.distillation.buffers() if b.is_floating_point()]
        self.good = [t.detach().clone() for t in (*self.trained, *self.moments)]
        self.places = self.trainer.train_dataset.last_places

    def weight(self) -> None:
        """One number of a weight."""
        self._one_of(self.rng.choice(self.trained))

    def moment(self) -> None:
        """One number of the teacher's running moments."""
        self._one_of(self.rng.choice(self.moments))

    def gradient(self) -> None:
        """One number of a gradient, which the optimizer takes in."""
        parameter = self.rng.choice(self.trained)
        parameter.grad = torch.zeros_like(parameter)
        self._one_of(parameter.grad)
        torch.optim.AdamW([parameter], lr=1e-3).step()
        parameter.grad = None

    def overflow(self) -> None:
        """Weights that are finite themselves, with which no loss is."""
        for parameter in self.trained:
            parameter.data.fill_(1e38)

    def loss(self) -> None:
        """A loss that was not looked at yet, as on a GPU between two log lines."""
        value = torch.tensor(self.rng.choice(VALUES))
        self.trainer.divergence.note(self.trainer.state.global_step, value, self.places)

    def _one_of(self, tensor: torch.Tensor) -> None:
        tensor.data.view(-1)[self.rng.randrange(tensor.numel())] = self.rng.choice(VALUES)

    def step(self, number: int) -> None:
        """One ruined step, which has to be refused; now and then one that is not ruined, which has to be saved."""
        for tensor, good in zip((*self.trained, *self.moments), self.good):
            tensor.data.copy_(good)
        trainer, kind = self.trainer, self.rng.choice(("weight", "moment", "gradient", "overflow", "loss"))
        trainer.state.global_step, checkpoint = 100 + number, self.folder / f"checkpoint-{100 + number}"
        trainer.divergence._recent.clear()
        trainer.divergence.note(trainer.state.global_step, torch.tensor(1.0), self.places)
        if number % 100 == 99:
            trainer._save_checkpoint(trainer.model, None)
            files = list(checkpoint.glob("*.safetensors"))
            assert len(files) == 2
            assert all(torch.isfinite(t).all() for file in files for t in load_file(file).values())
            shutil.rmtree(checkpoint)
            return
        getattr(self, kind)()
        try:
            trainer._save_checkpoint(trainer.model, None)
        except FloatingPointError:
            self.found[kind] += 1
        else:
            raise AssertionError(f"step {number}, {kind}: saved")
        assert not checkpoint.exists()
        (self.folder / "diverged.jsonl").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ruins, number = Ruins(options.out), 0
    while sum(ruins.found.values()) < options.steps:
        ruins.step(number)
        number += 1
        if number % 500 == 0:
            print(f"{sum(ruins.found.values())} ruined steps, none saved: {dict(ruins.found)}", flush=True)
    print(f"{sum(ruins.found.values())} ruined steps, none saved: {dict(ruins.found)}")


if __name__ == "__main__":
    main()
