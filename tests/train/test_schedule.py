"""A constant rate that decays at the end: what it is at each step, what a longer run goes on from, what is refused."""

import shutil
from io import StringIO

import pytest
from rich.console import Console
from runs import losses, run
from safetensors.torch import load_file

from vora.train.from_recipe import training_arguments
from vora.train.recipe import load_recipe
from vora.train.schedule import check_schedule, decay_of, distill_only_factor, factor_of

STABLE = {"lr_scheduler_type": "warmup_stable_decay", "save_total_limit": 1}
NUM_DECAY = {"num_decay_steps": 2, "decay_type": "linear"}


def stable(recipe, num_steps, distill_only_steps, **training):
    """A recipe whose rate stays, and falls in the last two steps of each phase."""
    found = recipe(**STABLE | {"lr_scheduler_kwargs": NUM_DECAY, "max_steps": num_steps, **training})
    found.teacher.distill_only_steps = distill_only_steps
    return found


def trained(recipe, folder, **options):
    """A run's text, and its trained weights."""
    console = Console(record=True, file=StringIO(), width=300)
    run(recipe, folder, console=console, **options)
    return console.export_text(), load_file(folder / "final" / "adapter_model.safetensors")


def test_each_phase_stays_constant_and_decays_at_its_end(recipe, tmp_path):
    wanted = stable(recipe, 12, 5)
    arguments = training_arguments(wanted, tmp_path)
    assert [distill_only_factor(arguments, 5, 7)(step) for step in range(5)] == [0, 1, 1, 1, 0.5]
    assert [factor_of(arguments, 7)(step) for step in range(7)] == [0, 1, 1, 1, 1, 1, 0.5]
    assert decay_of(wanted, 12, 5) == (3, 5) and decay_of(wanted, 12, 6) == (10, 12) == decay_of(wanted, 12, 12)
    falling = distill_only_factor(training_arguments(recipe(), tmp_path), 4, 2)
    assert [falling(step) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0] and decay_of(recipe(), 6, 6) is None


@pytest.mark.parametrize("only_distills", [True, False])
def test_a_longer_run_goes_on_from_before_the_decay_as_if_it_had_been_longer_all_along(
    recipe, only_distills, tmp_path
):
    def of(num_steps):
        return stable(recipe, num_steps, num_steps if only_distills else 0, save_steps=100)

    said, short = trained(of(4), tmp_path / "parts")
    assert "constant until step 2 and decays until step 4" in said
    names = {folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-4"}
    said, longer = trained(of(7), tmp_path / "parts", resume=True)
    assert "checkpoint-4 is past step 2, where the learning rate began to decay" in said
    assert "going on from checkpoint-2" in said and (tmp_path / "parts" / "unused-checkpoint-4").exists()
    _, whole = trained(of(7), tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(longer[name].equal(whole[name]) for name in whole)
    assert any(not longer[name].equal(short[name]) for name in whole)


def test_epochs_say_as_well_where_a_longer_run_goes_on(recipe, tmp_path):
    def of(num_epochs):
        found = stable(recipe, 1, 0, save_steps=100, num_train_epochs=num_epochs)
        del found.training["max_steps"]
        return found

    trained(of(20), tmp_path / "parts")
    said, longer = trained(of(30), tmp_path / "parts", resume=True)
    assert "where the learning rate began to decay" in said and "going on from checkpoint-" in said
    _, whole = trained(of(30), tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(longer[name].equal(whole[name]) for name in whole)


def test_a_lost_checkpoint_from_before_the_decay_is_told(recipe, tmp_path):
    trained(stable(recipe, 4, 4), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-2")
    said, _ = trained(stable(recipe, 6, 6), tmp_path / "run", resume=True)
    assert "no checkpoint from before it is left" in said


def test_a_decay_that_is_longer_and_begins_earlier_goes_on_from_before_it(recipe, tmp_path):
    def of(num_steps, length):
        given = {"save_steps": 1, "save_total_limit": 9, "lr_scheduler_kwargs": {"num_decay_steps": length}}
        return stable(recipe, num_steps, 0, **given)

    trained(of(6, 2), tmp_path / "parts")
    shutil.copytree(tmp_path / "parts", tmp_path / "lost")
    said, longer = trained(of(7, 5), tmp_path / "parts", resume=True)
    assert "checkpoint-6 is past step 4" in said and "going on from checkpoint-2" in said
    _, whole = trained(of(7, 5), tmp_path / "whole")
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert all(longer[name].equal(whole[name]) for name in whole)
    for step in (1, 2):
        shutil.rmtree(tmp_path / "lost" / f"checkpoint-{step}")
    with pytest.raises(ValueError, match="begun at step 2, .* lower .*num_decay_steps to 3 or less"):
        trained(of(7, 5), tmp_path / "lost", resume=True)


def test_a_checkpoint_alone_goes_on_exactly_in_another_place(recipe, tmp_path):
    wanted = stable(recipe, 6, 6, save_steps=3)
    _, whole = trained(wanted, tmp_path / "whole")
    steps = losses(tmp_path / "whole")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "whole" / "checkpoint-4").rename(tmp_path / "elsewhere" / "checkpoint-4")
    shutil.rmtree(tmp_path / "whole")
    _, moved = trained(wanted, tmp_path / "elsewhere", resume=True)
    assert all(moved[name].equal(whole[name]) for name in whole)
    assert losses(tmp_path / "elsewhere") == {step: steps[step] for step in (5, 6)}


@pytest.mark.parametrize("phases", [{"distill_only_steps": 2}, {"distill_only_steps": 0, "vision_lr_scale": 0.1}])
def test_a_rate_that_follows_the_loss_has_no_phases(recipe, tmp_path, phases):
    values = recipe(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps").model_dump()
    values["teacher"] |= phases
    found = load_recipe(values)
    with pytest.raises(ValueError, match="reduce_lr_on_plateau keeps its own rates, and teacher.distill_only_steps"):
        check_schedule(found, training_arguments(found, tmp_path))
    values["teacher"] |= {"distill_only_steps": 0, "vision_lr_scale": 1.0}
    check_schedule(load_recipe(values), training_arguments(found, tmp_path))


@pytest.mark.parametrize(
    ("options", "num_steps", "wanted"),
    [
        (None, 6, "num_decay_steps is missing"),
        ({"num_decay_steps": "2"}, 6, "num_decay_steps is '2'"),
        ({"num_decay_steps": 0}, 6, "num_decay_steps is 0"),
        ({"num_decay_steps": True}, 6, "num_decay_steps is True"),
        ({"num_decay_steps": 2, "num_stable_steps": 3}, 6, "num_stable_steps would end the constant rate"),
        ({"num_decay_steps": 6}, 6, "The 6 steps that only distill are fewer than 1 of warm-up and 6 of decay"),
        ({"num_decay_steps": 3}, 9, "The 3 steps of the run are fewer than 1 of warm-up and 3 of decay"),
    ],
)
def test_a_decay_that_is_not_known_or_does_not_fit_is_refused(recipe, options, num_steps, wanted, tmp_path):
    found = stable(recipe, num_steps, 6)
    found.training["lr_scheduler_kwargs"] = options
    with pytest.raises(ValueError, match=wanted):
        check_schedule(load_recipe(found.model_dump()), training_arguments(found, tmp_path))
    with pytest.raises(ValueError, match=wanted):
        run(found, tmp_path / "run")
