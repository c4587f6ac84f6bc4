"""The sequences of a run among its processes, as many as there are now.

A run has as many streams as it had processes when it began, S, each with its part of all samples (`PackedSequences`).
They are read in turn: the n-th sequence of a run comes from stream n mod S. Of R processes, process r learns from the
n-th where n mod R = r. So another number of processes goes on with the very same sequences, each of them once. The
price: where R is no divisor of S, several processes make all sequences of a stream, and each leaves out the others'.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from pathlib import Path

from vora.data.packing import Batch, PackedSequence
from vora.data.stream import PackedSequences

POSITION_FILE = "data_position_{}.json"  # one per stream, in each checkpoint


def streams_of_process(rank: int, num_ranks: int, num_streams: int) -> range:
    """The streams that a process reads.

    >>> [list(streams_of_process(rank, 4, 2)) for rank in range(4)]
    [[0], [1], [0], [1]]
    >>> list(streams_of_process(0, 1, 2))
    [0, 1]
    """
    step = gcd(num_ranks, num_streams)
    return range(rank % step, num_streams, step)


def num_streams_of(checkpoint: Path | str) -> int:
    """Of the run that saved a checkpoint."""
    return len(list(Path(checkpoint).glob(POSITION_FILE.format("*"))))


class Streams:
    """This process's part of a run's sequences, in order, from where the run stands.

    Args:
        streams: {number: stream} of `streams_of_process`.
        num_streams: of the run.
        sequences_per_step: of all processes together.
        distill_only_steps: of the run; in each of its first steps all sequences are of images alone.
    """

    def __init__(
        self, streams: Mapping[int, PackedSequences], num_streams: int, rank: int, num_ranks: int,
        sequences_per_step: int, distill_only_steps: int = 0,
    ) -> None:  # fmt: skip
        self.streams, self.num_streams, self.rank, self.num_ranks = streams, num_streams, rank, num_ranks
        self.sequences_per_step, self.distill_only_steps = sequences_per_step, distill_only_steps
        self._begin, self._num_taken = 0, 0  # sequences of all before this process's first; of this process since
        self._num_made = dict.fromkeys(streams, 0)  # of each stream, from the beginning of the run
        self._current = next(iter(streams))
        self._end_distilling(distill_only_steps * sequences_per_step)

    def __iter__(self) -> Iterator[PackedSequence]:
        """Sequences from where the last one ended."""
        sources = {number: iter(stream) for number, stream in self.streams.items()}
        while True:
            number = self._begin + (self.rank - self._begin) % self.num_ranks + self._num_taken * self.num_ranks
            self._current, place = number % self.num_streams, number // self.num_streams
            for _ in range(place - self._num_made[self._current]):
                next(sources[self._current])  # another process's
            sequence = next(sources[self._current])
            self._num_made[self._current], self._num_taken = place + 1, self._num_taken + 1
            yield sequence

    @property
    def cursor(self) -> int:
        """How many sequences all processes together have taken, if they are as far."""
        return self._begin + self._num_taken * self.num_ranks

    @property
    def epoch(self) -> float:
        """How often the mixture has been read, see `PackedSequences.epoch`."""
        return sum(stream.epoch for stream in self.streams.values()) / len(self.streams)

    @property
    def max_images(self) -> int:
        """Of a sample that this process's streams gave, in one conversation."""
        return max(stream.max_images for stream in self.streams.values())

    @property
    def last_places(self) -> list[list[int]]:
        """[stream, chunk, index] of each sample of the last sequence, which `name_of` names."""
        return [[self._current, *place] for place in self.streams[self._current].last_places]

    def name_of(self, place: Sequence[int]) -> str:
        """What the sample at a place is called; nothing is read."""
        return self.streams[place[0]].name_of(place[1:])

    def collate(self, sequences: Sequence[PackedSequence]) -> Batch:
        """Sequences to a batch of `Objective.forward`."""
        return self.streams[self._current].collate(sequences)

    def save(self, checkpoint: Path, samples_seen: int) -> None:
        """Write where the streams stand after a step, each by the process that took its last sequence, and how many
        samples all processes have learned from."""
        cursor, made = self.cursor, {}
        for number in self.streams:
            made[number] = len(range(number, cursor, self.num_streams))
            last = number + max(0, made[number] - 1) * self.num_streams
            if last % self.num_ranks == self.rank:
                state = {"cursor": cursor, "distill_only_steps": self.distill_only_steps, "samples_seen": samples_seen}
                file = checkpoint / POSITION_FILE.format(number)
                file.write_text(json.dumps(self.streams[number].state_dict() | state))

    def load(self, checkpoint: Path, num_steps: int) -> int:
        """Go on where a checkpoint was saved after so many steps; how many samples had been learned from. ValueError,
        naming what differs, where it was made with other data."""
        seen = 0
        for number, stream in self.streams.items():
            state = json.loads((checkpoint / POSITION_FILE.format(number)).read_text())
            then = state.pop("distill_only_steps", None)
            if then is not None and then != self.distill_only_steps and num_steps > min(then, self.distill_only_steps):
                raise ValueError(
                    f"The checkpoint was made with other data: of its {num_steps} steps the first "
                    f"{min(then, num_steps)} only distilled, and now {self.distill_only_steps} would: restore "
                    f"teacher.distill_only_steps={then}, or start a new run from the weights: model.vora=THIS_RUN."
                )
            if then is not None:  # as many steps, whatever a step has now
                own = stream.fingerprint | {"distill_only_sequences": state["data"]["distill_only_sequences"]}
                stream.fingerprint = own
            seen = state.pop("num_samples_seen", 0) * self.num_streams  # of each process alone, in older ones
            seen = state.pop("samples_seen", seen)
            self._begin = state.pop("cursor", self.num_streams * state["num_sequences"])  # which older ones lack
            self._num_taken, self._num_made[number] = 0, len(range(number, self._begin, self.num_streams))
            stream.load_state_dict(state)
        self._end_distilling(self._begin + max(0, self.distill_only_steps - num_steps) * self.sequences_per_step)
        return seen

    def _end_distilling(self, end: int) -> None:
        for number, stream in self.streams.items():
            stream.distill_only_sequences = len(range(number, end, self.num_streams))


class PackedBatches:
    """What the Trainer takes as its dataloader: batches of so many sequences, from where `sequences` stands, with the
    `places` of their samples (`Streams.name_of`)."""

    def __init__(self, sequences: Streams, sequences_per_batch: int) -> None:
        self.sequences, self.sequences_per_batch = sequences, sequences_per_batch

    def __iter__(self) -> Iterator[Batch]:
        left = iter(self.sequences)
        while True:
            sequences, places = [], []
            for _ in range(self.sequences_per_batch):
                sequences.append(next(left))
                places += self.sequences.last_places
            yield self.sequences.collate(sequences) | {"places": places}
