"""Every benchmark runs at toy size and writes rows with the names that others rely on."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contestants import SIZES, batches_of_rows, build_ours, full_rows, original_batches
from large_step import model_flops
from memory import exponent
from torch.utils.flop_counter import FlopCounterMode
from train_step import losses_in_float32

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TOY = {
    "train_step": "--size toy --rounds 1 --rows 1 --row-tokens 256",
    "prefill_decode": "--size toy --rounds 1 --new-tokens 2",
    "mask": "--tokens 256 300 --rounds 1",
    "memory": "--size toy --row-tokens 128 --grow-tokens 16 --grow-batch --our-dtype float32",
    "flex": "--size toy",
    "large_step": "--size toy --rounds 1 --rows 1 --row-tokens 256 --ceiling-side 64 --checkpointing",
}


@pytest.mark.parametrize("name", TOY)
def test_rows_have_their_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *TOY[name].split(), "--json", str(tmp_path / "rows.json")])
    importlib.import_module(name).main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    for row in rows:
        assert {"name", "ours", "baseline", "ratio", "unit", "machine", "commit"} <= row.keys()
        assert row["name"] in capsys.readouterr().out or len(rows) > 1
    assert all(row["ours"] > 0 for row in rows if row["unit"] in ("samples/s", "tokens/s", "ms", "FLOP/s"))


def test_both_contestants_have_the_same_losses_in_float32():
    for name, (ours, original) in losses_in_float32(SIZES["toy"]).items():
        assert abs(ours - original) < 1e-5, name


def test_both_contestants_learn_the_same_answers():
    size = SIZES["toy"]
    samples, rows = full_rows(size, 256, 2, num_turns=2)
    packed = [sample for row in rows for sample in row]
    batches = original_batches(samples, size, 3)
    theirs = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    ours = torch.cat([torch.from_numpy(sample["targets"][sample["targets"] != -100]) for sample in packed])
    assert torch.equal(theirs.sort().values, ours.sort().values)
    assert sum(len(batch["frames"]) for batch in batches) == sum(sample["num_samples"] for sample in packed)


def test_flops_of_the_model_are_those_that_are_counted():
    """Of one nearly full row; torch does not count what attention does on a CPU."""
    size = SIZES["toy"]
    _, rows = full_rows(size, 256, 1)
    (batch,) = batches_of_rows(rows, size, 256, 1)
    learner = build_ours(size)
    with FlopCounterMode(display=False) as counter:
        learner(**batch)["loss"].backward()
    assert model_flops(learner, batch) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_exponent():
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 2], [0, 1]) is None


def test_gpu_script_is_sound():
    subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"], check=True)
    script = (BENCHMARKS / "gpu.sh").read_text()
    limits = [
        int(line.split()[2]) for line in script.split("\nelse\n")[1].splitlines() if line.strip().startswith("part ")
    ]
    assert sum(limits) < 9 * 60
    assert torch.cuda.is_available() or "--toy" in script
