"""The learning rate over a run: the recipe's schedule, a phase of its own for the first steps that only distill, and
where a constant rate begins to decay (`lr_scheduler_type: warmup_stable_decay`, arXiv 2404.06395)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from vora.train.recipe_sections import Recipe

STABLE = "warmup_stable_decay"
OWN_RATES = {"reduce_lr_on_plateau", "greedy"}  # schedules that keep rates in their state, so that none can change
NUM_DECAY = "training.lr_scheduler_kwargs.num_decay_steps"


def decay_steps(recipe: Recipe) -> int:
    """Over how many last steps of each phase a rate that was constant decays; 0 under any other schedule."""
    return _options(recipe).get("num_decay_steps", 0) if recipe.training.get("lr_scheduler_type") == STABLE else 0


def _options(recipe: Recipe) -> dict[str, Any]:
    given = recipe.training.get("lr_scheduler_kwargs")
    return given if isinstance(given, dict) else {}


def decay_of(recipe: Recipe, num_steps: int, step: int) -> tuple[int, int] | None:
    """(after how many steps the rate begins to decay, after how many it ends) in the phase of a run that the `step`-th
    step belongs to; None where the schedule is another."""
    first, length = min(recipe.distill_only_steps, num_steps), decay_steps(recipe)
    end = first if step <= first else num_steps
    return (end - length, end) if length else None


def check_schedule(recipe: Recipe, arguments: TrainingArguments) -> None:
    """Raise where a rate is to stay constant and then to decay, but it is not said over how many steps, or the run has
    fewer; or where it follows the loss, but vision is to have phases of its own; ValueError."""
    kind = str(recipe.training.get("lr_scheduler_type"))
    has_phases = recipe.teacher is not None and (recipe.distill_only_steps or recipe.teacher.vision_lr_scale != 1)
    if kind in OWN_RATES and has_phases:
        raise ValueError(
            f"training.lr_scheduler_type {kind} keeps its own rates, and teacher.distill_only_steps and "
            "teacher.vision_lr_scale change them: choose another schedule, or leave these out."
        )
    if recipe.training.get("lr_scheduler_type") != STABLE:
        return
    length, given = decay_steps(recipe), _options(recipe)
    if type(length) is not int or length < 1:
        said = f"{NUM_DECAY} is {length!r}" if "num_decay_steps" in given else f"{NUM_DECAY} is missing"
        raise ValueError(f"{said}: with {STABLE}, say over how many last steps the rate decays, such as a tenth.")
    if "num_stable_steps" in given:
        raise ValueError(
            "training.lr_scheduler_kwargs.num_stable_steps would end the constant rate whatever training.max_steps "
            "says: leave it out, for what warm-up and decay leave of the steps is constant."
        )
    first, num_steps = recipe.distill_only_steps, arguments.max_steps
    phases = {"that only distill": min(first, num_steps), "of the run": num_steps - first}
    for what, count in phases.items() if num_steps > 0 else ():
        warmup = arguments.get_warmup_steps(count)
        if 0 < count < warmup + length:
            raise ValueError(
                f"The {count:,} steps {what} are fewer than {warmup:,} of warm-up and {length:,} of decay: raise "
                f"training.max_steps, or lower {NUM_DECAY}."
            )


def schedule_in_words(recipe: Recipe, num_steps: int) -> str | None:
    """Where a constant rate ends, in a line; None under any other schedule."""
    found = decay_of(recipe, num_steps, num_steps)
    if found is None:
        return None
    start, end = found
    return (
        f"The learning rate is constant until step {start:,} and decays until step {end:,}: with more steps, --resume "
        "goes on from before the decay."
    )


def factor_of(arguments: TrainingArguments, num_steps: int) -> Callable[[int], float]:
    """What the rate is multiplied by at each step of a phase of so many, by the recipe's schedule."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    warmup, options = arguments.get_warmup_steps(num_steps), dict(arguments.lr_scheduler_kwargs or {})
    return get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, num_steps, options).lr_lambdas[0]


def distill_only_factor(arguments: TrainingArguments, num_first: int, num_rest: int) -> Callable[[int], float]:
    """The same for the first steps, that only distill: to zero at their end, after a constant rate where the recipe
    says so, else all along."""
    if arguments.lr_scheduler_type == STABLE:
        return factor_of(arguments, num_first)
    return partial(_falling, num_first, max(1, arguments.get_warmup_steps(num_rest)))


def _falling(num_steps: int, num_warmup: int, step: int) -> float:
    return min((step + 1) / num_warmup, (num_steps - step) / num_steps)


def in_phases(
    first: Callable[[int], float], rest: Callable[[int], float], num_first: int, scale: float, step: int
) -> float:
    """`first` for so many steps, then `scale` times `rest`, from its beginning."""
    return first(step) if step < num_first else scale * rest(step - num_first)
