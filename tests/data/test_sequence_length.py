"""The length of packed sequences that the data fills best: found near the chosen one, and taken when asked."""

import numpy as np
import pytest
from test_readers import write

from vora.data.readers import load_source
from vora.data.sequence_length import best_length, length_that_fits, share_filled
from vora.data.stats import dataset_statistics
from vora.data.stream import PackedSequences


def test_captions_of_295_tokens_fill_1220_better_than_1024():
    sizes = np.random.default_rng(0).integers(285, 305, 2000).tolist()
    assert share_filled(sizes, 1024) == pytest.approx(0.87, abs=0.02) and share_filled(sizes, 1220) > 0.95
    length, share = best_length(sizes, 1024)
    assert 1180 <= length <= 1240 and share > 0.95 and share == share_filled(sizes, length)


def test_no_sample_is_lost_and_nothing_is_said_where_nothing_is_better():
    assert 1000 <= best_length([1000] * 50, 1024)[0] <= 1008
    assert best_length(np.random.default_rng(0).integers(20, 200, 500).tolist(), 1024)[0] == 1024
    assert best_length([300] * 99 + [1020], 1024)[0] >= 1020
    assert best_length([3000, 10, 10], 1024)[0] >= 3000 and best_length([3000, 10, 10], 1024, most=2048)[0] <= 2048
    assert share_filled([], 64) == 0


def test_it_is_named_by_the_statistics_and_found_before_training(tmp_path, processor):
    write(tmp_path / "t.jsonl", *({"question": "hm " * 8, "answer": f"{n}"} for n in range(90)))
    source = load_source(tmp_path / "t.jsonl")
    packed = PackedSequences([source], processor, 100)
    summary, _ = dataset_statistics(packed, ["it"])
    best = summary["best_sequence_length"]
    assert 75 <= best["sequence_length"] <= 125
    assert best["packing_efficiency"] > summary["packing_efficiency"] + 0.01 or best["sequence_length"] == 100
    ranks = [PackedSequences([source], processor, 4096, rank=rank, num_ranks=2) for rank in (0, 1)]
    lengths = {length_that_fits(packed, 100) for packed in ranks}
    assert len(lengths) == 1 and 75 <= lengths.pop() <= 125
