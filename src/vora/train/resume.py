"""What a run goes on from, and what of its recipe may have changed since: applied or refused, and told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerState
from transformers.utils.generic import flatten_dict

from vora.checkpoint.manifest import STATE
from vora.checkpoint.run_directory import checkpoint_up_to
from vora.train.recipe import load_recipe
from vora.train.recipe_sections import Recipe
from vora.train.schedule import NUM_DECAY, OWN_RATES, decay_of
from vora.train.stages import vision_is_frozen

FIXED = (  # on which the optimizer's state depends, or the heads that it is of
    "stage", "training.optim", "training.optim_args", "training.optim_target_modules", "teacher.pairs",
    "teacher.pairing", "teacher.spread", "teacher.summary", "teacher.center", "teacher.standardize",
)  # fmt: skip
LENGTH = ("training.max_steps", "training.num_train_epochs")
RATES = ("training.learning_rate", "training.lr_scheduler", "learning_rates.")
FROM_RECIPE = ("initial_lr", "weight_decay", "betas", "eps")  # of an optimizer's groups; others change while it runs


def checkpoint_to_resume(
    checkpoint: str, recipe: Recipe, directory: Path, num_steps: int, tell: Callable[[str], None]
) -> str:
    """The checkpoint that a run of so many steps goes on from: the one that was found, or one from before a decay that
    comes later now. ValueError where none lies before the decay as it is now."""
    checkpoint = _before_decay(checkpoint, recipe, directory, num_steps, tell)
    tell(f"Going on from {Path(checkpoint).name} of {num_steps:,} steps.")
    return checkpoint


def _before_decay(
    checkpoint: str, recipe: Recipe, directory: Path, num_steps: int, tell: Callable[[str], None]
) -> str:
    """Where the learning rate had decayed for an end that comes later now, the newest checkpoint from before that, if
    there is one: a rate that rises again undoes a part of what its decay has settled."""
    try:
        before = load_recipe(directory / "recipe.yaml")
    except ValueError:  # of another version, or left on another machine
        return checkpoint
    state = TrainerState.load_from_json(str(Path(checkpoint, STATE)))
    step = state.global_step
    then, now = decay_of(before, state.max_steps, step), decay_of(recipe, num_steps, step)
    if then is None or now is None or step <= then[0] or now[1] <= then[1]:
        return checkpoint
    why = f"{Path(checkpoint).name} is past step {then[0]:,}, where the learning rate began to decay"
    start = min(then[0], now[0])  # a longer decay may begin before the old one did
    if (found := checkpoint_up_to(directory, start)) is None and now[0] < then[0]:
        raise ValueError(
            f"{why}, with {NUM_DECAY} of {now[1] - now[0]:,} it would have begun at step {now[0]:,}, and no "
            f"checkpoint from before that is left: lower {NUM_DECAY} to {now[1] - then[0]:,} or less, or start anew."
        )
    if found is None:
        tell(f"Warning: {why}, and no checkpoint from before it is left: the rate rises again, which undoes a part.")
        return checkpoint
    tell(f"{why}, and the run ends at step {now[1]:,} now: going on from {Path(found).name}.")
    return found


def check_ended(recipe: Recipe, directory: Path, num_done: int) -> None:
    """Raise ValueError where a run whose steps are all done is to have another recipe: nothing would come of it but
    files that say what was not trained."""
    try:
        before = load_recipe(directory / "recipe.yaml")
    except ValueError:  # of another version, or lost
        return
    changes = _changes(before, recipe)
    if found := [text for key, text in changes.items() if key not in LENGTH]:
        raise ValueError(
            f"All {num_done} steps are done, so that nothing would be trained with what changed: {'; '.join(found)}. "
            "Raise training.max_steps to train on with it, or leave it as it was."
        )


def _changes(before: Recipe, recipe: Recipe) -> dict[str, str]:
    """{key: what it was and is} of what differs."""
    then, now = (flatten_dict(one.model_dump(mode="json")) for one in (before, recipe))
    differ = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: f"{key} was {str(then.get(key))[:80]}, is {str(now.get(key))[:80]}" for key in differ}


def tell_changes(recipe: Recipe, directory: Path, tell: Callable[[str], None]) -> None:
    """Name what differs from the recipe that the run had before; ValueError where that cannot change on the way."""
    try:
        before = load_recipe(directory / "recipe.yaml")
    except ValueError:  # of another version, or lost
        tell("Warning: the recipe that this run had before cannot be read, so changes of it are not named.")
        return
    changes, kinds = _changes(before, recipe), {one.training.get("lr_scheduler_type") for one in (before, recipe)}
    fixed = FIXED + (RATES if kinds & OWN_RATES else ())
    if vision_is_frozen(before) != vision_is_frozen(recipe):
        fixed += ("teacher.vision_lr_scale", "teacher.distill_only_steps")
    if 0 in {one.teacher.weight for one in (before, recipe) if one.teacher}:
        fixed += ("teacher.weight",)
    if wrong := [text for key, text in changes.items() if key.startswith(fixed)]:
        raise ValueError(
            f"{'; '.join(wrong)}: the optimizer's state in {directory} is of another kind. Leave that as it was, or "
            "start a new run with model.vora."
        )
    if changes:
        tell(f"Changed since this run was started last, and used from here on: {'; '.join(changes.values())}.")


def hyperparameters(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a recipe says of each group of an optimizer, before a checkpoint's state is loaded into it."""
    return [{name: group[name] for name in FROM_RECIPE if name in group} for group in optimizer.param_groups]


def use_hyperparameters(wanted: list[dict[str, Any]], optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Have the recipe's values again, in whose place a checkpoint's state brought those of its time."""
    for group, values in zip(optimizer.param_groups, wanted):
        group.update(values)
    if isinstance(scheduler, LambdaLR):
        scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        scheduler._last_lr = scheduler.get_lr()
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr):
            group["lr"] = rate
