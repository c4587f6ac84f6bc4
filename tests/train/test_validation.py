"""What is measured while a run trains: the right values, on what is never trained on, and without any change to it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from command import vora
from PIL import Image
from ranks import train_ranks
from runs import COLOURS, losses, run, write_lines
from safetensors.torch import load_file
from test_resume import StopAt
from transformers import TrainerCallback

from vora.checkpoint.layout import read_info
from vora.checkpoint.lineage import read_card
from vora.data.bad_samples import BadSamples
from vora.data.held_out import key_of_image
from vora.data.packing import collate_sequences, places, tokenize_sample
from vora.data.readers import load_source
from vora.eval.rows import Data, Rows, SkippedRows
from vora.eval.scoring.teacher_forced import score_answers
from vora.train.from_recipe import (
    check_apart,
    check_fsdp,
    check_recipe,
    open_sources,
    open_validation,
    packed_sequences,
    read_held_out,
    training_arguments,
)
from vora.train.recipe import load_recipe, save_recipe
from vora.train.run_log import read_log
from vora.train.stages import build_objective
from vora.train.validation import right_and_other

EVERY_OTHER = {"eval_steps": 2, "save_steps": 2, "save_total_limit": 9}


class Logged(TrainerCallback):
    """Notes what trackers would be told."""

    def __init__(self):
        self.found = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.found.append(dict(logs))


@pytest.fixture(scope="module")
def other_file(data_file, tmp_path_factory):
    """Other questions about the colours, with one bad row."""
    rows = [
        {"image": data_file.replace("train.jsonl", f"{c}.png"), "question": "say it", "answer": c} for c in COLOURS
    ]
    rows.append({"image": "gone.png", "question": "say it", "answer": "red"})
    return write_lines(tmp_path_factory.mktemp("other") / "validation.jsonl", rows)


@pytest.fixture(scope="module")
def with_validation(recipe, other_file):
    """Makes the recipe of a run that is measured on other samples."""

    def make(validation=None, data=None, **training):
        values = recipe(**training).model_dump()
        values["data"] |= {"validation": validation or {"sources": [{"path": other_file}]}, **(data or {})}
        return load_recipe(values)

    return make


def asked_rows(path, held_out):
    """Names of the rows that an evaluation asks about."""
    return [row.name for row in Rows(Data([path], held_out=held_out)).read(SkippedRows())]


def measured(folder):
    return {line["step"]: line for line in read_log(folder / "validation.jsonl")}


@pytest.fixture(scope="module")
def whole(with_validation, other_file, tmp_path_factory):
    folder, logged = tmp_path_factory.mktemp("whole") / "run", Logged()
    validation = {"sources": [{"path": other_file}], "probe_samples": 4}
    trainer = run(with_validation(validation, **EVERY_OTHER), folder, callbacks=[logged], draws=True)
    return folder, trainer, logged


def test_validation_changes_no_loss_and_no_sample(recipe, whole, tmp_path):
    run(recipe(save_steps=2, save_total_limit=9), tmp_path / "run")
    assert losses(tmp_path / "run") == losses(whole[0])
    name = "final/adapter_model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (whole[0] / name).read_bytes()
    places_in_data = [(f / "checkpoint-4" / "data_position_0.json").read_text() for f in (tmp_path / "run", whole[0])]
    assert places_in_data[0] == places_in_data[1] and not (tmp_path / "run" / "validation.jsonl").exists()


def test_its_losses_are_means_over_all_labels_and_image_tokens(whole, other_file, recipe):
    folder, trainer, logged = whole
    objective, processor = trainer.model.eval(), trainer.processing_class
    each = []
    for sample in list(map(load_source(other_file).__getitem__, range(4))):
        tokens = tokenize_sample(sample, processor, sample.conversations)
        batch = collate_sequences([[tokens]], len(tokens["input_ids"]), 0)
        batch |= places(batch, processor.image_token_id)
        with torch.no_grad():
            found = objective(**batch)
        each.append((found["lm_loss"], len(batch["label_places"]), found["distill_loss"], len(batch["image_places"])))
    lm, labels, distill, images = torch.tensor(each).T
    last, wanted = measured(folder)[6], {"eval_lm_loss": lm @ labels / labels.sum()}
    wanted["eval_distill_loss"] = distill @ images / images.sum()
    wanted["eval_loss"] = sum(wanted.values())
    assert {name: last[name] for name in wanted} == pytest.approx({n: float(v) for n, v in wanted.items()}, rel=1e-5)
    assert (
        list(measured(folder)) == [2, 4, 6]
        and last["samples_seen"] == read_log(folder / "log.jsonl")[-1]["samples_seen"]
    )
    told = [line for line in logged.found if "eval_loss" in line]  # as trackers are
    assert [line["eval_lm_loss"] for line in told] == [line["eval_lm_loss"] for line in measured(folder).values()]
    report = (folder / "report.md").read_text()
    assert f"| eval_lm_loss, last | {last['eval_lm_loss']:.4f} |" in report and (folder / "loss.png").exists()
    (bad,) = read_log(folder / "bad_samples.jsonl")
    assert bad["record"].endswith(":4") and "gone.png" in bad["cause"]


def test_the_probe_compares_as_the_evaluation_does(whole, with_validation, other_file, tmp_path):
    trainer = whole[1]
    validation = trainer.eval_dataset
    assert len(validation.pairs) == 4
    for right, other in validation.pairs:
        assert right.conversations == other.conversations and len(right.conversations) == 1
        assert key_of_image(right.images[0]) != key_of_image(other.images[0])
    records = enumerate(one for pair in validation.pairs for one in pair if "gone" not in str(one.images))
    scores = {}
    for batch in score_answers(trainer.model.vora, trainer.processing_class, records):
        scores |= {index: float(score.log_probs[0]) for index, score in batch.items()}
    wins = [scores[n] > scores[n + 1] for n in range(0, len(scores) // 2 * 2, 2)]
    assert measured(whole[0])[6]["eval_right_beats_other"] == pytest.approx(sum(wins) / len(wins))


def test_a_model_that_looks_is_seen_to(with_validation, data_file, tmp_path):
    values = with_validation(max_steps=100, learning_rate=1e-2, lr_scheduler_type="linear").model_dump()
    values["lora"]["num_blocks"] = 3
    shutil.copy(data_file, other := data_file.replace("train.jsonl", "again.jsonl"))
    values["data"]["validation"] = {"sources": [{"path": other}], "probe_samples": 100}
    values["training"] |= {"eval_steps": 100, "eval_on_start": True}
    run(load_recipe(values), tmp_path / "run")
    found = measured(tmp_path / "run")
    assert found[100]["eval_right_beats_other"] == 1.0 and found[100]["eval_lm_loss"] < 0.5 * found[0]["eval_lm_loss"]


def test_a_resumed_run_measures_the_same(with_validation, other_file, whole, tmp_path):
    wanted = with_validation({"sources": [{"path": other_file}], "probe_samples": 4}, **EVERY_OTHER)
    with pytest.raises(InterruptedError):
        run(wanted, tmp_path / "run", callbacks=[StopAt(3)])
    run(wanted, tmp_path / "run", resume=True)
    assert measured(tmp_path / "run") == measured(whole[0]) and losses(tmp_path / "run") == losses(whole[0])


def test_a_held_out_share_is_never_trained_on(two_sources, tmp_path):
    share = ["data.validation.share=0.3", "training.max_steps=6", "training.eval_steps=3", "training.save_steps=3"]
    recipe = load_recipe(two_sources, [*share, "teacher.distill_only_steps=2"])
    sources, arguments = open_sources(recipe.data), training_arguments(recipe, tmp_path)
    _, processor = build_objective(recipe)
    sequences = packed_sequences(recipe, sources, processor, arguments)
    validation = open_validation(recipe, sequences, arguments, tmp_path / "bad.jsonl")
    held = {sample.name for sample in validation.samples}
    assert 0.15 * 90 < len(held) < 0.45 * 90
    drawn = [sequences.maker.draw(s, n) for s, source in enumerate(sources) for n in range(len(source))]
    assert {name for name, found in drawn if found is None} == held
    recipe.data.validation = None
    others = packed_sequences(recipe, sources, processor, arguments).maker  # as if nothing were held out
    places = [(s, n) for s, source in enumerate(sources) for n in range(len(source))]
    for (name, found), (same, without) in zip(drawn, (others.draw(*place) for place in places)):
        assert name == same and (found is None or (found["input_ids"] == without["input_ids"]).all())
    recipe = load_recipe(two_sources, [*share, "teacher.distill_only_steps=2"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    (tmp_path / "final").mkdir()
    for place in (tmp_path, tmp_path / "recipe.yaml", tmp_path / "final"):  # a run, its recipe, what it has learned
        rows = [row for source in sources for row in asked_rows(source.name, read_held_out(place))]
        assert sorted(rows) == sorted(Path(name).name for name in held)  # of texts as of images
    whole_run, cut = tmp_path / "whole", tmp_path / "cut"
    run(recipe, whole_run)
    with pytest.raises(InterruptedError):
        run(recipe, cut, callbacks=[StopAt(4)])
    run(recipe, cut, resume=True)
    assert losses(cut) == losses(whole_run) and measured(cut) == measured(whole_run) != {}
    for changed in ("data.validation.seed=1", "data.validation.share=0.2", "data.validation=null"):
        with pytest.raises(ValueError, match="held_out was"):
            other = [*share, "teacher.distill_only_steps=2", "training.max_steps=9", changed]
            run(load_recipe(two_sources, other[3:] if "null" in changed else other), cut, resume=True)


class StopInValidation(TrainerCallback):
    def on_evaluate(self, args, state, control, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_while_it_validates_costs_no_further_step(with_validation, tmp_path):
    with pytest.raises(InterruptedError, match="SIGTERM: stopped and saved at step 2 of 6. Go on from checkpoint-2"):
        run(with_validation(**EVERY_OTHER), tmp_path / "run", callbacks=[StopInValidation()])


def test_every_loss_of_the_training_is_measured_whatever_the_batch(two_sources, tmp_path):
    terms = ["lora.text_kl_weight=0.5", "data.answer_balance=1", "teacher.weight=2", "data.validation.share=0.4"]
    few = ["training.max_steps=4", "teacher.distill_only_steps=2", "training.eval_steps=1", "training.eval_delay=2"]
    trainer = run(load_recipe(two_sources, [*terms, *few]), tmp_path / "run")
    found = measured(tmp_path / "run")
    assert list(found) == [2, 3, 4] and trainer.eval_dataset.sequences_per_batch == 8
    total = found[4]["eval_answer_loss"] + 0.5 * found[4]["eval_text_loss"] + 2 * found[4]["eval_distill_loss"]
    assert found[4]["eval_loss"] == pytest.approx(total) and found[4]["eval_lm_loss"] != found[4]["eval_answer_loss"]
    trainer.eval_dataset.sequences_per_batch = 1
    assert trainer.evaluate() == pytest.approx({n: v for n, v in found[4].items() if n != "step"}, rel=1e-4)


def test_two_processes_measure_what_one_does(two_sources, tmp_path):
    still = ["training.max_steps=2", "training.learning_rate=0", "training.eval_steps=2", "teacher.center=false"]
    still += ["data.validation.share=0.3", "data.validation.probe_samples=9", "teacher.distill_only_steps=0"]
    run(load_recipe(two_sources, still), tmp_path / "one")
    train_ranks(2, two_sources, tmp_path / "two", still)
    one, two = (measured(tmp_path / name)[2] for name in ("one", "two"))
    assert two["samples_seen"] > one["samples_seen"]
    assert two == pytest.approx(one | {"samples_seen": two["samples_seen"]}, rel=1e-5)


@pytest.mark.parametrize("loads", [True, False])
def test_the_best_checkpoint_is_what_a_run_stands_for(with_validation, tmp_path, loads):
    best = {"metric_for_best_model": "lm_loss", "greater_is_better": True}  # so that it is an early one
    trainer = run(
        with_validation(load_best_model_at_end=loads, **best, **EVERY_OTHER | {"save_total_limit": 2}),
        tmp_path / "run",
    )
    found = measured(tmp_path / "run")
    step = max(found, key=lambda step: found[step]["eval_lm_loss"])
    assert step < 6 and trainer.state.best_global_step == step
    shutil.move(tmp_path / "run", tmp_path / "moved")
    folders = [read_info(tmp_path / "moved").path, tmp_path / "moved" / "final"]
    weights = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert folders[0].name == f"checkpoint-{step}" and same == loads
    assert read_card(tmp_path / "moved" / "final")["stages"][0]["steps"] == (step if loads else 6)
    merged, last = tmp_path / "merged", tmp_path / "last"
    said = vora("merge", tmp_path / "moved", "-o", merged).stderr
    assert f"moved/checkpoint-{step}, the best by eval_lm_loss ({found[step]['eval_lm_loss']:.4f})" in said
    assert "the best by" not in vora("merge", folders[1], "-o", last).stderr
    same_merged = load_file(merged / "model.safetensors").items()
    other = load_file(last / "model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in same_merged) == loads
    assert [read_card(folder)["stages"][0]["steps"] for folder in (merged, last)] == [step, step if loads else 6]
    assert (
        f"| best checkpoint | checkpoint-{step}, by eval_lm_loss: " in (tmp_path / "moved" / "report.md").read_text()
    )


def test_epochs_are_counted_on_the_mixture(two_sources, tmp_path):
    epochs = ["training.num_train_epochs=2", "training.eval_strategy=epoch", "training.save_strategy=epoch"]
    epochs += ["data.validation.share=0.2", "teacher.distill_only_steps=2", "training.load_best_model_at_end=true"]
    recipe = load_recipe(two_sources, [*epochs, "training.max_steps=-1"])
    trainer = run(recipe, tmp_path / "run")
    lines, steps = read_log(tmp_path / "run" / "log.jsonl"), trainer.state.max_steps
    assert lines[1]["epoch"] == 0 and lines[-1]["step"] == steps and lines[-1]["epoch"] == pytest.approx(2, abs=0.2)
    first = next(line["step"] for line in lines if line["epoch"] >= 1)
    assert {first, steps} <= set(measured(tmp_path / "run")) and len(measured(tmp_path / "run")) <= 3
    assert trainer.train_dataset.epoch == lines[-1]["epoch"]
    fewer = run(load_recipe(two_sources, [*epochs, "training.max_steps=3"]), tmp_path / "fewer")
    assert fewer.state.global_step == 3 < steps
    assert list(measured(tmp_path / "fewer")) == [3]


@pytest.mark.parametrize(
    ("validation", "training", "message"),
    [
        (None, {"eval_strategy": "steps"}, "eval_strategy has no samples to evaluate on.*data.validation.share=0.02"),
        (None, {"load_best_model_at_end": True}, "load_best_model_at_end has no samples"),
        (None, {"metric_for_best_model": "loss"}, "metric_for_best_model has no samples"),
        ({}, {}, "exactly one of share"),
        ({"share": 0.1, "sources": [{"path": "x"}]}, {}, "exactly one of share"),
        ({"share": 1.0}, {}, "less than 1"),
        ({"sources": [{"path": "x", "weight": 1}]}, {}, "leave weight and augment out"),
        ({"sources": [{"path": "easy-vqa", "max_samples": 9}]}, {}, "which is trained on too: name another split"),
        ({"share": 0.1}, {"metric_for_best_model": "right_beats_other"}, "not measured.*validation.probe_samples"),
        ({"share": 0.1}, {"metric_for_best_model": "eval_accuracy"}, "known: loss, lm_loss"),
        ({"share": 0.1, "probe_sample": 3}, {}, "did you mean probe_samples"),
    ],
)
def test_what_cannot_be_measured_is_an_error_at_once(validation, training, message):
    data = {"sources": [{"path": "easy-vqa"}], "validation": validation}
    with pytest.raises(ValueError, match=message):
        check_recipe(load_recipe({"model": {"llm": "none"}, "data": data, "training": training}))


def test_files_that_are_trained_on_are_not_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"question": "what?", "answer": "this"}]
    for name in ("a/train.jsonl", "a/test.jsonl", "b.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        write_lines(Path(name), rows)
    for name in ("train/ox/1.png", "train/ass/1.png", "val/ox/1.png", "val/ass/1.png"):
        Path("f", name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(Path("f", name))
        Path("f", name).with_suffix(".txt").write_text("a caption")
    Path("link.jsonl").symlink_to("b.jsonl")
    trained = [load_source("b.jsonl"), load_source("a"), load_source("f")]
    same = ["b.jsonl", "./b.jsonl", tmp_path / "b.jsonl", "b*.jsonl", "link.jsonl", "a/train.jsonl", "f/train/ox"]
    for path in same:
        for split in ("train", "validation"):
            with pytest.raises(ValueError, match="1 of 1 files, such as .* are trained on too: name other files"):
                check_apart(trained, [load_source(path, split)])
    with pytest.raises(ValueError, match="are trained on too"):
        check_apart([load_source("f/train/ox")], [load_source("f")])
    check_apart(trained, [load_source("a", "test"), load_source("f", "val"), load_source("a/test.jsonl")])


def test_a_run_is_not_measured_on_its_own_file(with_validation, data_file, tmp_path):
    with pytest.raises(ValueError, match="are trained on too"):
        run(with_validation({"sources": [{"path": data_file, "split": "validation"}]}), tmp_path / "own")


def test_spread_weights_are_not_measured():
    values = {"model": {"llm": "none"}, "data": {"sources": [{"path": "x"}], "validation": {"share": 0.1}}}
    with pytest.raises(ValueError, match="data.validation is measured by each process"):
        check_fsdp(load_recipe(values), are_spread=True)


def test_too_few_samples_are_an_error_before_the_first_step(with_validation, data_file, tmp_path):
    with pytest.raises(ValueError, match="share 1e-09 of 4 rows leaves 0 samples"):
        run(with_validation({"share": 1e-9}), tmp_path / "none")
    one = write_lines(
        tmp_path / "one.jsonl", [{"image": data_file.replace("train.jsonl", "red.png"), "caption": "red"}]
    )
    with pytest.raises(ValueError, match="No two of 1 validation samples"):
        run(with_validation({"sources": [{"path": one}], "probe_samples": 5}), tmp_path / "alone")
    gone = write_lines(tmp_path / "gone.jsonl", [{"image": "gone.png", "caption": "red"}])
    with pytest.raises(ValueError, match="All 1 validation samples are bad.*bad_samples.jsonl says why"):
        run(with_validation({"sources": [{"path": gone}]}, eval_on_start=True), tmp_path / "bad")


def test_partners_differ_in_image_and_answer(data_file):
    samples = list(map(load_source(data_file).__getitem__, range(4)))
    twice = [samples[0], samples[0], samples[1]]
    pairs = right_and_other(twice, 9)
    assert [right.images == other.images for right, other in pairs] == [False] * 3
    assert right_and_other(twice[:2], 9) == [] and right_and_other(twice, 0) == []
    assert json.dumps([right.conversations for right, _ in pairs]) == json.dumps(
        [right.conversations for right, _ in right_and_other(twice, 9)]
    )
    assert BadSamples(None, 0.1).num_bad == 0
