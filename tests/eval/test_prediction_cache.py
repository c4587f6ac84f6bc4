"""Predictions in a file: what it goes on from, and what it refuses."""

import os

import pytest

from vora.eval.prediction_cache import PredictionCache, fingerprint


def test_predictions_of_other_conditions_are_refused(tmp_path):
    PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).add([{"index": 0}])
    assert PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 0}).num_found == 1
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        PredictionCache(tmp_path / "x.jsonl", {"task": "vqa", "seed": 1})
    (tmp_path / "y.jsonl").write_text("no json\n")
    with pytest.raises(ValueError, match="no file of predictions"):
        PredictionCache(tmp_path / "y.jsonl", {})


def test_what_was_bad_is_asked_again(tmp_path):
    PredictionCache(tmp_path / "x.jsonl", {}).add([{"index": 0, "name": "a", "bad": "no such file"}, {"index": 1}])
    again = PredictionCache(tmp_path / "x.jsonl", {})
    assert list(again.done) == [1]
    again.add([{"index": 0, "name": "a"}])
    assert "bad" not in PredictionCache(tmp_path / "x.jsonl", {}).done[0]


def test_a_lone_surrogate_comes_back_as_it_was(tmp_path):
    said = "a \ud83d dog, é🙂 and \udc80"
    cache = PredictionCache(tmp_path / "x.jsonl", {"prompt": said})
    cache.add([{"index": 0, "generated": said}])
    cache.rewrite(cache.done.values())
    assert PredictionCache(tmp_path / "x.jsonl", {"prompt": said}).done[0]["generated"] == said
    assert "é🙂" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")


def test_fingerprints_see_a_change_anywhere_in_small_files(tmp_path):
    data = bytearray(os.urandom(100_000))
    (tmp_path / "a").write_bytes(data)
    before = fingerprint(tmp_path / "a")
    data[77_777] ^= 1
    (tmp_path / "a").write_bytes(data)
    assert fingerprint(tmp_path / "a") != before
