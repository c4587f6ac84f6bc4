"""Which row comes when: a seeded, endless order over rows of any number, of which nothing is stored but a position."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

ROWS_PER_GROUP = 512  # rows shuffled among each other; their blocks are in memory together
GOLDEN = (5**0.5 - 1) / 2


class SourceOrder:
    """The rows of one source, epoch after epoch, each once per epoch.

    In each epoch the blocks (`block_sizes` int[K] are their numbers of rows) are shuffled, then cut into groups of
    some 512 rows, then the rows of each group shuffled: so a reader needs one group at a time, and any position is
    reached without walking there. Orders of different seeds are independent.
    """

    def __init__(self, block_sizes: Sequence[int] | np.ndarray, seed: Iterable[int]) -> None:
        self.block_sizes, self.seed = np.asarray(block_sizes), tuple(seed)
        self.num_rows = int(self.block_sizes.sum())
        self._epoch: tuple[Any, ...] = (None,)  # the last one used, with its number
        self._group: tuple[Any, ...] = (None,)

    def draw(self, number: int) -> tuple[int, int, int, int]:
        """(epoch, group, block, offset in block) of the row that is drawn as the `number`-th."""
        epoch, place = divmod(number, self.num_rows)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, *self._groups(epoch))
        _, starts, groups = self._epoch
        group = bisect_right(starts, place) - 1
        if self._group[0] != (epoch, group):
            self._group = ((epoch, group), *self._rows(epoch, group, groups[group]))
        _, blocks, offsets = self._group
        return epoch, group, int(blocks[place - starts[group]]), int(offsets[place - starts[group]])

    def _groups(self, epoch: int) -> tuple[list[int], list[np.ndarray]]:
        """(rows before each group, blocks of each group) of an epoch."""
        shuffled = np.random.default_rng([*self.seed, epoch]).permutation(len(self.block_sizes))
        ends = self.block_sizes[shuffled].cumsum()
        starts, groups, first, before = [], [], 0, 0
        while first < len(shuffled):
            last = min(int(np.searchsorted(ends, before + ROWS_PER_GROUP)), len(shuffled) - 1)
            starts.append(before)
            groups.append(shuffled[first : last + 1])
            first, before = last + 1, int(ends[last])
        return starts, groups

    def _rows(self, epoch: int, group: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(block, offset) of each row of a group, in order."""
        sizes = self.block_sizes[blocks]
        shuffled = np.random.default_rng([*self.seed, epoch, group]).permutation(int(sizes.sum()))
        offsets = np.concatenate([np.arange(size) for size in sizes])
        return blocks.repeat(sizes)[shuffled], offsets[shuffled]


class Mixture:
    """Which source each sample comes from: shares as the weights say, spread as evenly as can be.

    Points of a golden-ratio sequence fall into intervals as long as the weights, so that any run of samples has
    nearly the shares of the whole. Weights are positive, one per source; they need not add up to one.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        shares = np.asarray(weights, float) / sum(weights)
        self.borders, self.num_sources = shares.cumsum()[:-1], len(shares)
        self.offset = np.random.default_rng(seed).random()
        self._counted = (0, np.zeros(self.num_sources, int))

    def sources(self, first: int, count: int) -> np.ndarray:
        """int[count]: the sources of samples `first`, `first` + 1, ..."""
        points = (self.offset + GOLDEN * np.arange(first, first + count)) % 1
        return np.searchsorted(self.borders, points, side="right")

    def counts(self, number: int) -> np.ndarray:
        """int[S]: how many of the first `number` samples come from each source; it goes on from the last count."""
        known, counts = self._counted if self._counted[0] <= number else (0, np.zeros(self.num_sources, int))
        for first in range(known, number, step := 1 << 20):
            drawn = self.sources(first, min(step, number - first))
            counts = counts + np.bincount(drawn, minlength=self.num_sources)
        self._counted = (number, counts)
        return counts
