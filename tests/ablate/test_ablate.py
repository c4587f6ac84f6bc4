"""A grid of runs: what it trains, that it goes on, and that its figures are right."""

import json
import os
import re
import signal
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import yaml
from command import vora
from PIL import Image
from rich.console import Console
from transformers import TrainerCallback

from vora.ablate.curves import read_curve, samples_until, smoothed
from vora.ablate.page import console_table, markdown
from vora.ablate.plot import limits
from vora.ablate.run import ablate
from vora.ablate.runs import _data_of, base_of
from vora.ablate.spec import load_spec, runs_of
from vora.ablate.table import summary
from vora.data.held_out import HeldOut
from vora.train.recipe import load_recipe
from vora.train.run import train
from vora.train.run_log import read_log

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


@pytest.fixture
def work(tmp_path, llm_folder, teacher_folder, sources, monkeypatch):
    """A folder with a recipe of two steps and its data; a function that writes a specification."""
    for drawn in ("vora.train.run_log.save_figure", "vora.eval.probe.probe.draw_probe"):  # of each run by itself
        monkeypatch.setattr(drawn, lambda *given: None)
    training = {"max_steps": 2, "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 2, "use_cpu": True}
    recipe = {
        "model": {"llm": llm_folder},
        "teacher": {"name": teacher_folder},
        "lora": {"rank": 4},
        "data": {"sources": [{"path": "images.jsonl"}], "sequence_length": 64},
        "training": {**training, "learning_rate": 1e-3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    def write(**values):
        spec = {"recipe": "recipe.yaml", "seeds": [0, 1], **values}
        (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
        return tmp_path / "spec.yaml"

    return write


VARIANTS = {"taught": [], "untaught": ["teacher.weight=0"]}
VQA = {"task": "vqa", "data": "images.jsonl"}


def losses(folder):
    return [(line["step"], line["lm_loss"], line["samples_seen"]) for line in read_log(folder / "log.jsonl")]


def test_two_variants_two_seeds_end_to_end(work, tmp_path):
    vqa, text = VQA | {"max_samples": 2}, {"task": "text", "data": "texts.jsonl"}
    probe = VQA | {"task": "probe", "max_samples": 4, "metrics": ["right_beats_other"]}
    spec, out = work(variants=VARIANTS, baseline="untaught", evaluate=[vqa, text, probe]), tmp_path / "out"
    result = vora("ablate", spec, "--out", out)
    assert result.returncode == 0, result.stderr
    found = json.loads((out / "table.json").read_text())
    taught, untaught = found["variants"]
    assert set(taught["lm_loss"]["by_seed"]) == {"0", "1"} and not found["warnings"]
    assert taught["distill_loss"]["mean"] > 0 and untaught["distill_loss"]["mean"] is None
    assert {"vqa vqa_accuracy", "probe right_beats_other"} < taught["metrics"].keys()
    assert [name for name in taught["metrics"] if name.startswith("probe ")] == ["probe right_beats_other"]
    assert 0.9 < taught["metrics"]["text perplexity_ratio"]["mean"] < 1.1  # of the recipe's LLM, after two steps
    for seed in (0, 1):
        folder = out / "taught" / f"seed-{seed}"
        assert taught["lm_loss"]["by_seed"][str(seed)] == losses(folder)[-1][1]
        assert not list(folder.glob("checkpoint-*")) and (folder / "final").exists()
    page = (out / "table.md").read_text()
    assert "untaught (baseline)" in page and "vora ablate" in page and re.search(r"` at (commit|version) [\w.]+", page)
    assert Image.open(out / "curves.png").width > 500
    # each run is the run that `vora train` makes
    train(load_recipe(tmp_path / "recipe.yaml", ["training.seed=1"]), tmp_path / "alone", console=QUIET)
    assert losses(tmp_path / "alone") == losses(out / "taught" / "seed-1") != losses(out / "taught" / "seed-0")
    # the same command again draws the same, without training or asking
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if "seed-" in str(path) and path.is_file()}
    drawn = {name: (out / name).read_bytes() for name in ("table.md", "table.json", "curves.png")}
    assert vora("ablate", spec, "--out", out).returncode == 0
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert drawn == {name: (out / name).read_bytes() for name in drawn}
    # a measurement of other words is done anew, other figures of one are not; another recipe is refused
    asked = [{**vqa, "max_samples": 1}, text, {**probe, "metrics": ["gain_over_other", "gain"]}]
    found = ablate(work(variants=VARIANTS, seeds=[0], evaluate=asked), out, [], QUIET)
    reports = out / "taught" / "seed-0" / "eval"
    assert json.loads((reports / "vqa.json").read_text())["num_examples"] == 1
    assert before[reports / "probe.json"] == (reports / "probe.json").stat().st_mtime_ns
    assert "probe gain_over_other" in found["variants"][0]["metrics"] and "name: gain." in found["warnings"][0]
    other = vora("ablate", spec, "lora.rank=8", "--out", out)
    assert other.returncode == 1 and "lora.rank was 4, is 8" in other.stderr


def test_a_grid_goes_on_after_a_signal_a_kill_and_a_failure(work, tmp_path, monkeypatch):
    lasting = {"seeds": [0], "set": ["training.max_steps=5", "training.save_steps=2"]}
    ablate(work(variants=VARIANTS, **lasting), tmp_path / "whole", [], QUIET)
    spec, out = work(variants={**VARIANTS, "wrong": ["data.sequence_length=512"]}, **lasting), tmp_path / "out"
    taught, untaught = (out / variant / "seed-0" for variant in VARIANTS)

    class EndAt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and "untaught" in args.output_dir:
                os.kill(os.getpid(), signal.SIGTERM)
            elif state.global_step == 3:
                raise SystemExit  # as with SIGKILL, what is on the disk stays as it was

    def ended(recipe, folder, resume, console, callbacks):
        return train(recipe, folder, resume, console, [*callbacks, *([] if resume else [EndAt()])])

    monkeypatch.setattr("vora.ablate.run.draw_curves", lambda *given: None)
    monkeypatch.setattr("vora.ablate.runs.train", ended)
    with pytest.raises(SystemExit):
        ablate(spec, out, [], Console(quiet=True))  # whose progress display is never ended
    assert (taught / "checkpoint-2").exists() and not (out / "table.md").exists()
    (taught / "final").mkdir()
    (taught / "final" / "half").write_text("killed while it saved")
    with pytest.raises(InterruptedError, match="Go on with: vora ablate"):
        ablate(spec, out, [], QUIET)
    assert list(untaught.glob("checkpoint-*")) and not (taught / "final" / "half").exists()
    first = (taught / "run.json").stat().st_mtime_ns
    result = vora("ablate", spec, "--out", out)
    assert first == (taught / "run.json").stat().st_mtime_ns
    for variant in VARIANTS:
        assert losses(out / variant / "seed-0") == losses(tmp_path / "whole" / variant / "seed-0")
    assert [step for step, *_ in losses(taught)] == [1, 2, 3, 4, 5]
    # a variant that fails is named, and is tried again
    assert result.returncode == 1 and "1 runs failed" in result.stderr
    found = json.loads((out / "table.json").read_text())
    good, _, bad = found["variants"]
    assert "context holds 256" in bad["failed"]["0"] and bad["lm_loss"]["mean"] is None
    assert good["lm_loss"]["mean"] > 0 and "context holds 256" in (out / "table.md").read_text()
    assert any("finished seeds" in warning for warning in found["warnings"])
    monkeypatch.undo()
    mended = ablate(work(variants={**VARIANTS, "wrong": ["lora.rank=2"]}, **lasting), out, [], QUIET)
    (warning,) = mended["warnings"]  # of rank 2
    assert not mended["variants"][2]["failed"] and warning.startswith("Variants train unequal numbers of parameters")


def test_a_part_of_a_grid_and_a_table_of_eight_columns(work, tmp_path):
    vqa = VQA | {"max_samples": 4}
    own = ["data.validation.share=0.5"]
    spec = work(variants={**VARIANTS, "wide": ["lora.rank=8"]}, evaluate=[vqa], seeds=[0, 1, 2], set=own)
    part = ["--seeds", "1", "--variants", "untaught,wide", "--max-samples", "2"]
    shown = vora("ablate", spec, "--out", tmp_path / "out", *part)
    assert shown.returncode == 0, shown.stderr
    found = json.loads((tmp_path / "out" / "table.json").read_text())
    assert [row["variant"] for row in found["variants"]] == ["untaught", "wide"] and found["baseline"] == "untaught"
    counts = "untaught [0-9,]+, wide [0-9,]+"
    assert any(re.search(f"unequal numbers of parameters \\({counts}\\)", one) for one in found["warnings"])
    metrics = found["variants"][0]["metrics"]
    assert "validation lm_loss" in metrics and "validation loss" not in metrics
    assert found["seeds"] == [1] and found["samples"] == 2 and "--seeds 1 --variants untaught,wide" in found["command"]
    report = tmp_path / "out" / "wide" / "seed-1" / "eval" / "vqa.json"
    assert json.loads(report.read_text())["num_examples"] == 2
    assert {"untaught", "(baseline)"} <= set(shown.stderr.split()) and "columns are in table.md" in shown.stderr
    rows = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("| ")]
    assert {line.count(" | ") for line in rows if "seeds" in line} == {7}
    for options, wanted in ((["--seeds", "one"], "no whole numbers"), (["--variants", "tall"], "there are taught")):
        failed = vora("ablate", spec, "--out", tmp_path / "no", *options)
        assert failed.returncode == 1 and wanted in failed.stderr


def test_runs_end_at_equal_samples(work, tmp_path, monkeypatch):
    monkeypatch.setattr("vora.ablate.run.draw_curves", lambda *given: None)
    variants = {"one": [], "two": ["data.sequence_length=32"]}
    spec = {"variants": variants, "seeds": [0], "set": ["training.max_steps=30", "training.save_steps=1000"]}
    found = ablate(work(**spec, samples=12), tmp_path / "out", [], QUIET)
    steps = [losses(tmp_path / "out" / variant / "seed-0")[-1] for variant in variants]
    assert steps[0][0] < steps[1][0] < 30 and all(12 <= seen <= 15 for *_, seen in steps)
    assert not any("unequal samples" in warning for warning in found["warnings"])
    with pytest.raises(ValueError, match="was ended by samples: 12, and the specification says 24"):
        ablate(work(**spec, samples=24), tmp_path / "out", [], QUIET)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": [1]}, r"spec.yaml: .*unknown key sed \(did you mean seeds\?\)"),
        ({"evaluate": [VQA | {"dat": "x"}]}, "did you mean data?"),
        ({"evaluate": [VQA | {"max_examples": 2}]}, "evaluate.0.max_examples is called max_samples now"),
        ({"variants": None}, "exactly one of variants"), ({"grid": {"lora.rank": [1]}}, "exactly one of variants"),
        ({"variants": {"a": ["lora.rank"]}}, "no override"), ({"variants": {"../a": []}}, "no name for a variant"),
        ({"variants": {"a": ["training.seed=3"]}}, "seeds stand under seeds"), ({"seeds": [1, 1]}, "twice"),
        ({"variants": None, "grid": {"lora.rank": [2, 2]}}, "a value twice"), ({"baseline": "b"}, "among taught, un"),
        ({"evaluate": [VQA, VQA]}, "a name"), ({"evaluate": [VQA | {"task": "probe", "of": "vqx"}]}, "vqx is no task"),
        ({"evaluate": [VQA | {"task": "vqx"}]}, "evaluate.*captions.*text"),
        ({"evaluate": [{"task": "vqa"}]}, "say data, what it is measured on, or held_out"),
        ({"evaluate": [VQA | {"held_out": True}]}, "held_out needs a recipe with data.val"),
        ({"variants": {"a": [], "b": ["lora.rnk=3"]}}, "variant b: .*did you mean rank"),
        ({"variants": {"a": [], "b": ["max_minutes=3"]}}, "leave it out"),
        ({"set": ["model.llm=null", "model.vora=a"], "evaluate": [VQA | {"task": "text"}]}, "say evaluate's base"),
        ({"evaluate": [VQA | {"data": "imgaes.jsonl"}]}, "evaluate's vqa: its data cannot be read: .*no such file"),
        ({"evaluate": [VQA | {"task": "text", "data": ["a.txt"]}]}, "evaluate's text: .* cannot be read: .*no such"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_work(work, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        ablate(work(**{"variants": VARIANTS, **values}), tmp_path / "out", [], QUIET)
    assert not (tmp_path / "out").exists()


def test_a_measurement_may_be_of_what_the_recipe_holds_out(work, tmp_path):
    spec = load_spec(work(variants=VARIANTS, evaluate=[VQA | {"held_out": True}, VQA | {"name": "all"}]))
    run = runs_of(spec, ["data.validation.share=0.4", "data.validation.seed=3"], tmp_path)[0]
    found = [_data_of(run, section, tmp_path).held_out for section in spec.evaluate]
    assert found == [HeldOut(0.4, 3), None]
    own = load_spec(work(variants=VARIANTS, evaluate=[{"task": "vqa", "held_out": True}])).evaluate[0]
    assert _data_of(run, own, tmp_path).paths == [str(tmp_path / "images.jsonl")]
    columns = {"question": "q"}
    several = ["data.sources.0.columns={question: q}", "data.validation.share=0.4"]
    one = runs_of(spec, several, tmp_path)[0]
    assert _data_of(one, own, tmp_path).columns == columns
    (tmp_path / "folder").mkdir()
    folder = runs_of(spec, ["data.sources=[{path: folder}]", "data.validation.share=0.4"], tmp_path)[0]
    assert _data_of(folder, own, tmp_path).split == "train" and _data_of(run, own, tmp_path).split is None
    two = runs_of(spec, [*several, "data.sources.+=more.jsonl"], tmp_path)[0]
    with pytest.raises(ValueError, match="2 sources: say data"):
        _data_of(two, own, tmp_path)


def test_a_grid_is_all_combinations_and_variants_override_the_command_line(work, tmp_path):
    spec = load_spec(work(grid={"lora.rank": [2, 4], "training.learning_rate": [1e-3, 0.01]}))
    assert list(spec.variants)[:2] == ["rank=2,learning_rate=0.001", "rank=2,learning_rate=0.01"]
    runs = runs_of(spec, ["lora.rank=3", "data.sequence_length=32"], tmp_path)
    assert [run.recipe.lora.rank for run in runs[:4]] == [2, 2, 4, 4]
    assert [run.recipe.training["learning_rate"] for run in runs[:2]] == [1e-3, 1e-2]
    assert [(run.seed, run.recipe.data.sequence_length) for run in runs] == [(0, 32)] * 4 + [(1, 32)] * 4
    assert runs[-1].recipe.training["seed"] == 1 and runs[-1].folder == tmp_path / runs[-1].variant / "seed-1"


SPECS = [path for path in sorted(ROOT.glob("recipes/*/ablations/*.yaml")) if path.stem != "base"]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: f"{path.parent.parent.name}-{path.stem}")
def test_every_specification_of_the_repository_loads(path, tmp_path):
    spec = load_spec(path)
    runs = runs_of(spec, ["data.folder=images", "teacher.name=vit"] * (path.stem != "full"), tmp_path)
    assert len(runs) == len(spec.variants) * len(spec.seeds)
    assert len({str(run.recipe) for run in runs}) == len(runs)  # no two runs are the same run
    for section in spec.evaluate:
        assert section.evaluation(base_of(runs[0], section)).name == section.task


def log(folder, values, size=10, alone=0):
    """A hand-made log: `alone` lines of images alone, then one per loss, each of `size` samples."""
    speeds = {"samples_per_second": 5.0, "tokens_per_second": 100.0, "distill_loss": 0.5}
    with (folder / "log.jsonl").open("w") as file:
        for number, loss in enumerate([None] * alone + list(values), 1):
            line = {"step": number, "samples_seen": size * number, **speeds}
            file.write(json.dumps(line if loss is None else {**line, "lm_loss": loss}) + "\n")
    return folder / "log.jsonl"


def test_curves_of_hand_made_logs(tmp_path):
    curve = read_curve(log(tmp_path, [8.0, 6.0, 4.0, 2.0], alone=6), window=0.2)  # 100 samples: two lines
    assert curve.samples.tolist() == [70, 80, 90, 100] and curve.smooth.tolist() == [8, 7, 5, 3]
    assert (curve.final, curve.distill_only, curve.samples_seen) == (3.0, 60, 100)
    assert (curve.seconds, curve.tokens, curve.distill_loss) == (20.0, 2000, 0.5)
    assert [samples_until(curve, loss) for loss in (6.0, 3.0, 8.5, 2.9)] == [85, 100, 70, None]
    alone = read_curve(log(tmp_path, [], alone=4), 0.1)  # nothing but distillation: its loss is compared
    assert (alone.loss, alone.final, alone.samples_seen, curve.loss) == ("distill_loss", 0.5, 40, "lm_loss")
    with pytest.raises(ValueError, match="no line with a loss"):
        read_curve(log(tmp_path, []), 0.1)
    # a long line weighs more than a short one
    assert smoothed(np.array([30, 40]), np.array([1.0, 5.0]), 100).tolist() == [1.0, 2.0]
    # curves are framed by what each does after its own first third
    falling = np.r_[np.full(100, 6.0), np.linspace(0.5, 0.3, 200)]
    found = limits([(np.linspace(first, 600, 300), falling[None]) for first in (300, 10)])
    low, high = found["ylim"]
    assert 0.25 < low < 0.3 and 0.5 < high < 0.6 and found["xlim"] == (10, 600)


def test_table_of_hand_made_logs(tmp_path):
    curves = {}
    for name, size, slopes in (("slow", 10, (4, 5, 6)), ("fast", 10, (8, 10, 11)), ("short", 5, (1, 1, 1))):
        for seed, slope in enumerate(slopes):
            curves[name, seed] = read_curve(log(tmp_path, np.linspace(10, 10 - slope, 11), size), 0.01)
    scores = {("slow", 0): {"vqa a": 0.5}, ("fast", 0): {"vqa a": 0.75}, ("fast", 1): {"vqa a": 0.25}}
    variants = {"slow": [], "fast": ["a=1"], "short": [], "broken": []}
    found = summary(variants, "slow", curves, scores, {("broken", 2): "it broke"})
    baseline, row, short_row, broken = found["variants"]
    half, by_seed = pytest.approx(4.303 / 3**0.5), {"0": 6.0, "1": 5.0, "2": 4.0}
    assert baseline["lm_loss"] == {"mean": 5.0, "half": half, "by_seed": by_seed}
    assert baseline["difference"] == {} and baseline["to_baseline"]["samples"]["mean"] == 110
    assert row["difference"]["lm_loss"]["by_seed"] == {"0": -4.0, "1": -5.0, "2": -5.0}
    assert row["difference"]["lm_loss"]["half"] == pytest.approx(4.303 / 3)  # far narrower than either variant's own
    assert row["difference"]["vqa a"] == {"mean": 0.25, "half": None, "by_seed": {"0": 0.25}}
    assert row["metrics"]["vqa a"]["half"] == pytest.approx(12.706 * 0.25)  # of two seeds
    needed = row["to_baseline"]["samples"]["by_seed"]  # the first line is at 10 samples, each next 10 further
    assert needed == pytest.approx({"0": 60.0, "1": 60.0, "2": 10 + 100 * 6 / 11})
    assert row["to_baseline"]["fewer_share"]["by_seed"]["0"] == pytest.approx(1 - 60 / 110)
    assert short_row["to_baseline"]["seeds_not_reached"] == [0, 1, 2]
    assert broken["failed"] == {"2": "it broke"} and broken["lm_loss"]["mean"] is None
    assert any("unequal samples (slow 110, fast 110, short 55)" in warning for warning in found["warnings"])
    given = {"name": "x", "baseline": "slow", "window": 0.01, "set": [], "seeds": [0, 1, 2], "command": "c"}
    page = markdown({**given, "commit": None, "commit_is_changed": None, "trained_at": [], **found})
    assert "not reached by 3 of 3" in page and "-4.6667 ± 1.4343" in page and "broken, seed 2: it broke" in page
    for width in (60, 80, 120):  # no word of the terminal's table is broken, and whether it looks comes first
        scores = {("slow", 0): {"vqa vqa_accuracy": 0.5, "probe right_beats_other": 0.75}}
        found = {**given, **summary(variants, "slow", curves, scores, {})}
        text = StringIO()
        Console(file=text, width=width).print(console_table(found, width))
        assert max(map(len, text.getvalue().splitlines())) <= width
        assert {"slow", "(baseline)", "against", "baseline", "5.0000±2.4843"} <= {*text.getvalue().split()}
        assert "vqa" not in text.getvalue() or "other" in text.getvalue().split()
    assert "beats_" in text.getvalue()
    alone = {("slow", seed): read_curve(log(tmp_path, [], alone=3 + seed), 0.01) for seed in (0, 1)}
    found = {**given, **summary({"slow": []}, "slow", alone, {}, {}), "commit": None, "commit_is_changed": None}
    assert "| slow (baseline) | 2 | 0.5000 ± 0.0000 |" in markdown({**found, "trained_at": []})
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert [{line.count("|") - 1 for line in lines} for lines in tables] == [{8}, {5}]  # columns, eight at most
