"""Several processes are one run: with DDP or FSDP2, on one number of them after another, and killed."""

import gc
import json
import random
import time
from functools import partial
from pathlib import Path

import kills
import pytest
import tiny
import torch
from ranks import train_ranks
from runs import close_to, losses, run
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from vora.checkpoint.save import merge
from vora.train.from_recipe import streams_of_run
from vora.train.recipe import load_recipe

NAMES = ("lm_loss", "distill_loss", "samples_seen")
FSDP = ["training.fsdp=true"]
BATCH = 4  # sequences of a step, on any number of processes


def settings(num, steps, *more):
    return [
        f"training.max_steps={steps}", "training.per_device_train_batch_size=1", "training.dataloader_num_workers=0",
        f"training.gradient_accumulation_steps={BATCH // num}", "training.save_steps=2", "data.sequence_length=64",
        "teacher.distill_only_steps=1", "teacher.standardize=true", *more,
    ]  # fmt: skip


def weights(folder):
    return {
        name: tensor
        for file in ("adapter_model.safetensors", "distillation.safetensors", "model.safetensors")
        if (folder / "final" / file).exists()
        for name, tensor in load_file(folder / "final" / file).items()
    }


def assert_same(found, expected):
    assert losses(found, NAMES) == close_to(losses(expected, NAMES), abs=1e-5)
    ours, theirs = weights(found), weights(expected)
    assert ours.keys() == theirs.keys() and theirs
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def write_share(folder, trainer):
    """Which share of the LLM's frozen weights this process has."""
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    own = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in frozen)
    share = {"share": own / sum(p.numel() for p in frozen), "sharded": trainer.is_fsdp_enabled}
    Path(folder, f"share-{trainer.args.process_index}.json").write_text(json.dumps(share))


@pytest.fixture(scope="module")
def expected(two_sources, tmp_path_factory):
    """One process that takes the micro-batches of two."""
    folder = tmp_path_factory.mktemp("one") / "run"
    with pytest.MonkeyPatch.context() as patch:
        of_two = lambda recipe, sequences, arguments, _: streams_of_run(recipe, sequences, arguments, 2)  # noqa: E731
        patch.setattr("vora.train.run.streams_of_run", of_two)
        run(load_recipe(two_sources, settings(1, 4)), folder)
    return folder


@pytest.fixture(scope="module")
def two_then_one(two_sources, tmp_path_factory):
    """Two processes with FSDP2 begin, one without goes on."""
    folder = tmp_path_factory.mktemp("fsdp") / "run"
    train_ranks(2, two_sources, folder, settings(2, 2, *FSDP), after=partial(write_share, folder.parent))
    run(load_recipe(two_sources, settings(1, 4)), folder, resume=True)
    return folder


def test_fsdp_spreads_the_frozen_llm_and_is_what_one_process_does(two_then_one, expected):
    for rank in (0, 1):
        found = json.loads((two_then_one.parent / f"share-{rank}.json").read_text())
        assert found["sharded"] and found["share"] == pytest.approx(0.5, abs=0.02)
    assert_same(two_then_one, expected)
    digests = [json.loads((run / "final" / "vora.json").read_text())["llm_digest"] for run in (two_then_one, expected)]
    assert digests[0] == digests[1] is not None


@pytest.mark.slow
@pytest.mark.parametrize("how", [[], FSDP], ids=["ddp", "fsdp"])
def test_a_run_on_2_then_4_then_1_processes_is_one_run(two_sources, tmp_path, how):
    train_ranks(2, two_sources, tmp_path / "whole", settings(2, 6))
    folder = tmp_path / "run"
    train_ranks(2, two_sources, folder, settings(2, 2, *how))
    train_ranks(4, two_sources, folder, settings(4, 4, *how), resume=True)
    run(load_recipe(two_sources, settings(1, 6)), folder, resume=True)
    assert_same(folder, tmp_path / "whole")
    merge(folder, tmp_path / "merged")
    merge(tmp_path / "whole", tmp_path / "expected")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "expected"))
    assert all((ours[name] - theirs[name]).abs().max() < 1e-5 for name in theirs)


def write_held(folder, num, trainer):
    """The bytes of all tensors that this process holds between two steps."""
    gc.collect()
    found = [one for one in gc.get_objects() if isinstance(one, torch.Tensor)]
    storages = [(one.to_local() if isinstance(one, DTensor) else one).untyped_storage() for one in found]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    Path(folder, f"held-{num}-{trainer.args.process_index}.json").write_text(str(held))


@pytest.mark.slow
def test_what_a_process_holds_falls_with_their_number(two_sources, tmp_path):
    """A frozen LLM of 148 MB."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 8}
    llm, held = tiny.save_tiny_llm(tmp_path / "llm", **shape), {}
    for num in (2, 4):
        more = [f"model.llm={llm}", "teacher.spread=true", "lora.rank=4", "training.save_strategy=no", *FSDP]
        after = partial(write_held, tmp_path, num)
        train_ranks(num, two_sources, tmp_path / str(num), settings(num, 2, *more), after=after)
        held[num] = max(float(file.read_text()) for file in tmp_path.glob(f"held-{num}-*.json"))
    assert 70e6 < held[2] < 78e6 and 35e6 < held[4] < 41e6


@pytest.mark.slow
def test_a_whole_model_is_spread_and_saved(two_then_one, two_sources, tmp_path):
    merge(two_then_one, tmp_path / "merged")
    stage = ["stage=finetune", "teacher=null", "model.llm=null", f"model.vora={tmp_path / 'merged'}", "lora={}"]
    train_ranks(2, two_sources, tmp_path / "whole", [*settings(2, 4)[:-2], *stage])
    train_ranks(2, two_sources, tmp_path / "run", [*settings(2, 2)[:-2], *stage, *FSDP])
    train_ranks(4, two_sources, tmp_path / "run", [*settings(4, 4)[:-2], *stage, *FSDP], resume=True)
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_of_two_processes_that_is_killed_goes_on_to_the_bit(tmp_path):
    recipe = kills.write_recipe(tmp_path / "data")
    begin = time.monotonic()
    train_ranks(2, recipe, tmp_path / "whole")
    seconds = time.monotonic() - begin
    assert kills.kill_a_run(recipe, tmp_path / "whole", tmp_path / "run", 4, seconds, random.Random(0)) > 0
