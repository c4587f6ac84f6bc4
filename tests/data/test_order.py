"""The order of samples: seeded, complete, and the same from wherever it is entered."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vora.data.order import ROWS_PER_GROUP, Mixture, SourceOrder

SIZES = st.lists(st.integers(1, 700), min_size=1, max_size=12)


def drawn(order, numbers):
    return [order.draw(number) for number in numbers]


@given(sizes=SIZES, seed=st.integers(0, 5), epoch=st.integers(0, 3), place=st.floats(0, 1))
@settings(max_examples=30)
def test_each_row_comes_once_an_epoch_and_any_place_can_be_entered(sizes, seed, epoch, place):
    order, total = SourceOrder(sizes, (seed,)), sum(sizes)
    found = drawn(order, range(epoch * total, (epoch + 1) * total))
    assert {e for e, *_ in found} == {epoch}
    rows = sorted((block, offset) for _, _, block, offset in found)
    assert rows == [(block, offset) for block, size in enumerate(sizes) for offset in range(size)]
    for number in range(int(place * total), min(total, int(place * total) + 20)):
        assert SourceOrder(sizes, (seed,)).draw(epoch * total + number) == found[number]


def test_few_blocks_are_needed_at_a_time_and_epochs_differ():
    order = SourceOrder([100] * 60, (0,))
    found = drawn(order, range(12_000))
    for start in range(0, 6000, 600):
        assert len({block for _, group, block, _ in found[start : start + 600]}) <= 2 * (ROWS_PER_GROUP // 100 + 1)
    assert [row[2:] for row in found[:6000]] != [row[2:] for row in found[6000:]]
    assert drawn(order, range(50)) != drawn(SourceOrder([100] * 60, (1,)), range(50))
    blocks = [block for _, _, block, _ in found[:6000]]
    assert np.corrcoef(blocks, np.arange(6000))[0, 1] < 0.3  # shuffled over the whole source


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=6), first=st.integers(0, 5000))
@settings(max_examples=60)
def test_shares_are_those_of_the_weights_everywhere(weights, first):
    mixture = Mixture(weights, seed=0)
    counts = np.bincount(mixture.sources(first, 1000), minlength=len(weights))
    assert np.abs(counts / 1000 - np.array(weights) / sum(weights)).max() < 0.02
    assert (mixture.counts(first + 1000) - mixture.counts(first) == counts).all()
