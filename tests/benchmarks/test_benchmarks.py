"""Every benchmark runs at toy size and writes rows with the names that others rely on."""

import importlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import pytest
import rows as rows_of_benchmarks
import torch
from contestants import SIZES, batches_of_sequences, build_ours, default_attention, full_sequences, original_batches
from large_step import needed_flops
from memory import in_own_process
from rows import peak_bytes, report, restart_peak, row
from torch.utils.flop_counter import FlopCounterMode
from where_time_goes import kind_of, profiled, seconds_by_kind, table

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TOY = {
    "train_step": "--size toy --rounds 1 --sequences 1 --sequence-length 256",
    "train_step with flex": "--size toy --attn flex_attention --only check",
    "prefill_decode": "--size toy --rounds 1 --new-tokens 2",
    "memory": "--size toy --sequence-length 128 --rounds 1 --our-dtype float32",
    "distill_step": "--size toy --rounds 1 --images 8 --ceiling-side 64",
    "unmerged": "--size toy --rounds 1 --new-tokens 2",
    "large_step": "--size toy --rounds 1 --sequences 1 --sequence-length 256 --ceiling-side 64 --checkpointing",
}


ON_REQUEST = ("train_step with flex", "prefill_decode", "memory", "unmerged", "large_step")  # 15 to 20 seconds each


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in ON_REQUEST else n for n in TOY])
def test_rows_have_their_names(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, *TOY[name].split(), "--json", str(tmp_path / "rows.json")])
    monkeypatch.setattr("memory.in_own_process", lambda work, *args: work(*args))  # which has a test of its own
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # without a C++ compiler
    importlib.import_module(name.split()[0]).main()
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert rows
    printed = capsys.readouterr().out
    for one in rows:
        assert {"name", "ours", "baseline", "ratio", "unit", "machine", "commit"} <= one.keys()
        assert one["name"] in printed
    assert all(one["ours"] > 0 for one in rows if one["unit"] in ("samples/s", "tokens/s", "ms", "FLOP/s", "bytes"))
    losses = [one for one in rows if "in float32" in one["name"]]
    assert len(losses) == (2 if name.startswith("train_step") else 0)
    assert all(abs(one["ours"] - one["baseline"]) < 1e-5 for one in losses)


def test_both_contestants_learn_the_same_answers():
    size = SIZES["toy"]
    samples, sequences = full_sequences(size, 256, 2, num_turns=2)
    packed = [sample for sequence in sequences for sample in sequence]
    batches = original_batches(samples, size, 3)
    theirs = torch.cat([batch["labels"][batch["labels"] != -100] for batch in batches])
    ours = torch.cat([torch.from_numpy(sample["targets"][sample["targets"] != -100]) for sample in packed])
    assert torch.equal(theirs.sort().values, ours.sort().values)
    assert sum(len(batch["frames"]) for batch in batches) == sum(sample["num_samples"] for sample in packed)


def test_flops_of_the_model_are_those_that_are_counted():
    """Of one nearly full sequence; in bf16, of which attention is counted on a CPU too, though not the teacher's."""
    size = SIZES["toy"]
    _, sequences = full_sequences(size, 256, 1)
    (batch,) = batches_of_sequences(sequences, size, 256, 1)
    objective = build_ours(size, attn=default_attention())
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        objective(**batch)["loss"].backward()
    assert needed_flops(objective, sequences[0]) == pytest.approx(counter.get_total_flops(), rel=0.1)


def peak_of(num_bytes):
    resting = restart_peak()
    bytearray(num_bytes).decode("latin-1")
    return peak_bytes() - resting


def test_a_process_of_its_own_has_a_peak_of_its_own():
    held = b"x" * 400_000_000
    assert 99e6 < in_own_process(peak_of, 50_000_000) < 150e6 < len(held)
    with pytest.raises(BrokenProcessPool):
        in_own_process(os._exit, 3)


def test_kinds_of_work_are_known_by_names():
    names = {
        "nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT": "matrix products",
        "aten::mm": "matrix products",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": "attention",
        "triton_tem_fused_flex_attention_0": "attention",
        "aten::bmm": "attention",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>": "optimizer and clipping",
        "aten::_log_softmax_backward_data": "losses",
        "bfloat16_copy_kernel_cuda": "copies and casts",
        "void at::native::vectorized_elementwise_kernel<4, MulFunctor>": "norms, activations, sums",
        "aten::view": "rest",
    }
    assert {name: kind_of(name) for name in names} == names
    matrix = torch.randn(300, 300)
    events = profiled(lambda: matrix @ matrix)
    found = seconds_by_kind(events)
    assert max(found, key=found.get) == "matrix products"
    assert sum(found.values()) == pytest.approx(sum(event.self_cpu_time_total for event in events) / 1e6)
    assert "aten::mm" in table(events)


def test_rows_are_written_as_they_come(tmp_path, capsys, monkeypatch):
    def rows():
        yield row("first", 6, 3, "s", extra=[1])
        yield row("second", 1, None, "bytes")
        raise RuntimeError("the third failed")

    with pytest.raises(RuntimeError):
        report(rows(), tmp_path / "some.json")
    first, second = json.loads((tmp_path / "some.json").read_text())
    assert (first["name"], first["ratio"], first["extra"]) == ("first", 2, [1])
    assert second["baseline"] is second["ratio"] is None and second["machine"] and second["commit"]
    printed = capsys.readouterr().out.splitlines()
    monkeypatch.setattr(sys, "argv", ["rows.py", str(tmp_path / "some.json")])
    rows_of_benchmarks.main()
    assert capsys.readouterr().out.splitlines() == ["some", *printed[2:]]


def test_gpu_script_is_sound():
    subprocess.run(["bash", "-n", BENCHMARKS / "gpu.sh"], check=True)
    script = (BENCHMARKS / "gpu.sh").read_text()
    deadline = int(re.search(r"^deadline=(\d+)$", script, flags=re.M).group(1))
    toy, real = (
        [line.split() for line in half.splitlines() if line.strip().startswith("part ")]
        for half in script.split('if [ -n "$toy" ]')[1].split("\nelse\n")
    )
    assert deadline <= 9 * 60 - 15  # the summary comes after it
    assert all(int(words[2]) < deadline for words in real)
    scripts = {path.stem for path in BENCHMARKS.glob("*.py") if "parser_of(__doc__)" in path.read_text()}
    scripts.remove("llama_cpp")  # of processors
    assert {Path(words[3]).stem for words in toy} == {Path(words[3]).stem for words in real} == scripts
    assert scripts == {name.split()[0] for name in TOY}
    assert len({words[1] for words in real}) == len(real)
