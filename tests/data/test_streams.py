"""A run's sequences among any number of processes: each once, in one order, over any chain of restarts."""

import doctest
import json
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vora.data import streams
from vora.data.streams import Streams, num_streams_of, streams_of_process


class Numbered:
    """Stands for a stream: its n-th sequence is (phase, stream, n); each phase counts anew."""

    def __init__(self, number, num_streams):
        self.number, self.fingerprint = number, {"processes": num_streams, "distill_only_sequences": 0}
        self.distill_only_sequences = 0
        self.position = {"distill_only": True, "num_sequences": 0}

    def __iter__(self):
        while True:
            if self.position["distill_only"] and self.position["num_sequences"] >= self.distill_only_sequences:
                self.position = {"distill_only": False, "num_sequences": 0}
            place = self.position["num_sequences"]
            self.position = self.position | {"num_sequences": place + 1}
            yield ("images" if self.position["distill_only"] else "all", self.number, place)

    def state_dict(self):
        return {**self.position, "data": self.fingerprint}

    def load_state_dict(self, state):
        assert state.pop("data") == self.fingerprint
        self.position = state


def processes(num_ranks, num_streams, per_step, distill_only_steps=0):
    return [
        Streams(
            {s: Numbered(s, num_streams) for s in streams_of_process(rank, num_ranks, num_streams)},
            num_streams, rank, num_ranks, per_step, distill_only_steps,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip


def steps(ranks, num_steps, per_step):
    """The sequences of each step, in no order within it."""
    sources = [iter(rank) for rank in ranks]
    return [
        sorted(sequence for source in sources for sequence in islice(source, per_step // len(ranks)))
        for _ in range(num_steps)
    ]


def saved(ranks, folder):
    folder.mkdir()
    for rank in ranks:
        rank.save(folder, 7)
    return folder


@given(st.lists(st.tuples(st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 5)), min_size=2, max_size=4))
@settings(max_examples=40)
def test_a_batch_of_one_size_has_the_same_sequences_on_any_number_of_processes(chain):
    """A chain of (processes, steps until they stop)."""
    batch, num_streams, num_steps, found, checkpoint = 12, chain[0][0], sum(number for _, number in chain), [], None
    whole = steps(processes(num_streams, num_streams, batch, distill_only_steps=5), num_steps, batch)
    with TemporaryDirectory() as folder:
        for number, (num_ranks, num_of_these) in enumerate(chain):
            ranks = processes(num_ranks, num_streams, batch, distill_only_steps=5)
            for rank in ranks:
                if checkpoint is not None:
                    assert rank.load(checkpoint, len(found)) == 7
            found += steps(ranks, num_of_these, batch)
            checkpoint = saved(ranks, Path(folder, f"checkpoint-{number}"))
            assert num_streams_of(checkpoint) == num_streams
    assert found == whole
    assert sum(kind == "images" for step in found for kind, *_ in step) == min(5, num_steps) * batch
    assert len({sequence for step in found for sequence in step}) == num_steps * batch


def test_examples_of_the_docstrings():
    assert doctest.testmod(streams).failed == 0


@pytest.mark.parametrize("chain", [(2, 4, 1), (3, 2, 5)])
def test_a_batch_that_grows_with_the_processes_goes_on_in_order(chain, tmp_path):
    """The same recipe on more processes: a step has more, none is lost or seen twice."""
    taken, checkpoint = [], None
    for number, num_ranks in enumerate(chain):
        ranks = processes(num_ranks, chain[0], 2 * num_ranks, distill_only_steps=6)
        for rank in ranks:
            if checkpoint is not None:
                rank.load(checkpoint, 4 * number)
        done = steps(ranks, 4, 2 * num_ranks)
        taken += [sequence for step in done for sequence in step]
        assert all(kind == "images" for step in done[: max(0, 6 - 4 * number)] for kind, *_ in step)
        checkpoint = saved(ranks, tmp_path / f"checkpoint-{number}")
    by_stream = {(kind, s): sorted(n for k, t, n in taken if (k, t) == (kind, s)) for kind, s, _ in taken}
    assert all(places == list(range(len(places))) for places in by_stream.values())
    assert sum(kind == "images" for kind, *_ in taken) == 4 * 2 * chain[0] + 2 * 2 * chain[1]


def test_steps_that_only_distill_change_while_they_last_and_older_checkpoints_are_read(tmp_path):
    (rank,) = processes(1, 1, 2, distill_only_steps=3)
    steps([rank], 2, 2)
    checkpoint = saved([rank], tmp_path / "checkpoint-2")
    (other,) = processes(1, 1, 2, distill_only_steps=1)
    with pytest.raises(ValueError, match="of its 2 steps the first 2 only distilled, and now 1 would"):
        other.load(checkpoint, 2)
    (longer,) = processes(1, 1, 2, distill_only_steps=5)
    longer.load(checkpoint, 2)
    assert [kind for step in steps([longer], 4, 2) for kind, *_ in step] == ["images"] * 6 + ["all"] * 2
    (first,) = processes(1, 1, 2, distill_only_steps=3)
    steps([first], 4, 2)
    (late,) = processes(1, 1, 2, distill_only_steps=9)
    with pytest.raises(ValueError, match="restore teacher.distill_only_steps=3"):
        late.load(saved([first], tmp_path / "checkpoint-4"), 4)
    file = checkpoint / "data_position_0.json"
    state = json.loads(file.read_text())
    for name in ("cursor", "distill_only_steps", "samples_seen"):
        state.pop(name)
    file.write_text(json.dumps(state | {"num_samples_seen": 9}))
    (older,) = processes(1, 1, 2, distill_only_steps=3)
    assert older.load(checkpoint, 2) == 9 and steps([older], 1, 2) == [[("images", 0, 4), ("images", 0, 5)]]
