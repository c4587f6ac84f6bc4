"""The stream of packed sequences: the same for any number of workers, resumed exactly, nothing lost, nothing twice."""

import json
import pickle
from collections import Counter
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_readers import write, write_tar
from tiny import command_line

from vora.data.readers import load_source
from vora.data.samples import CHUNK_SAMPLES, Chunks
from vora.data.stats import dataset_statistics
from vora.data.stream import PackedSequences

LENGTH = 96
CHANGES = {"crop": 0.3, "flip": True, "colour": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two sources: 50 images with questions, 30 texts; each answer is the number of its row."""
    folder = tmp_path_factory.mktemp("mixture")
    rng, rows = np.random.default_rng(0), []
    for number in range(50):
        height, width = rng.integers(4, 20, 2)
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what?" * rng.integers(1, 4), "answer": f"a{number}"})
    write(folder / "images.jsonl", *rows)
    write(folder / "texts.jsonl", *({"question": "hm " * rng.integers(1, 9), "answer": f"b{n}"} for n in range(30)))
    return folder


@pytest.fixture
def stream(folder, processor, monkeypatch):
    monkeypatch.setattr("vora.data.source.Source.rows_per_block", 8)
    monkeypatch.setattr("vora.data.order.ROWS_PER_GROUP", 20)

    def make(**options):
        sources = [load_source(str(folder / name)) for name in ("images.jsonl", "texts.jsonl")]
        return PackedSequences(sources, processor, LENGTH, **{"seed": 3, "image_tokens": (2, 9), **options})

    return make


@pytest.fixture
def stream_of(tmp_path, processor):
    """Makes the stream of a file with some rows."""

    def make(*rows, max_samples=None, name="train.jsonl", **options):
        if rows:
            write(tmp_path / name, *rows)
        source = load_source(str(tmp_path / name), max_samples=max_samples)
        return PackedSequences([source], processor, LENGTH, **{"bad_samples": tmp_path / "bad.jsonl", **options})

    return make


def content(sequence):
    """What a packed sequence holds, in a form that compares."""
    return [(one["input_ids"].tolist(), float(np.sum(one.get("pixel_values", 0)))) for one in sequence]


def answers(processor, sequence):
    tokenizer = processor.tokenizer
    return [tokenizer.decode(one["targets"][one["targets"] != -100], skip_special_tokens=True) for one in sequence]


def first(packed, count):
    return [content(sequence) for sequence in islice(packed, count)]


def named(tmp_path):
    """{number of a row: why it is bad}, each named once."""
    found = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    causes = {int(one["record"].rpartition(":")[2]): one["cause"] for one in found}
    assert len(causes) == len(found)
    return causes


@pytest.mark.parametrize(("before", "after", "stops"), [(0, 0, (1, 6, 7, 8, 20, 33)), (1, 3, (1, 7, 25))])
def test_a_resumed_stream_of_any_number_of_workers_goes_on_where_it_was(stream, before, after, stops):
    options = {"distill_only_sequences": 7, "weights": [3, 1], "augment": [CHANGES, None]}
    rng_state, packed = torch.get_rng_state(), stream(**options)
    whole = [(content(sequence), json.loads(json.dumps(packed.state_dict()))) for sequence in islice(packed, 40)]
    for stop in stops:
        state = whole[stop - 1][1]
        if before:
            begun = stream(num_workers=before, **options)
            assert first(begun, stop) == [sequence for sequence, _ in whole[:stop]] and begun.state_dict() == state
        resumed = stream(num_workers=after, **options)
        resumed.load_state_dict(state)
        assert first(resumed, 7) == [sequence for sequence, _ in whole[stop : stop + 7]]
        assert resumed.state_dict() == whole[stop + 6][1]
    assert torch.equal(torch.get_rng_state(), rng_state)  # a resumed run would miss what reading draws


@given(
    of=st.sampled_from([{"weights": [3, 1], "distill_only_sequences": 7}, {"rank": 1, "num_ranks": 2}, {"seed": 5}]),
    parts=st.lists(st.integers(0, 5), min_size=1, max_size=3),
)
@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_splits_of_a_stream_into_consumed_and_rest_give_the_same_sequences(stream, monkeypatch, of, parts):
    """Stopped after so many sequences, again and again; each goes on from what was saved as text."""
    for name in ("stream.WAITING", "stream.CHUNK_SAMPLES", "samples.CHUNK_SAMPLES"):
        monkeypatch.setattr(f"vora.data.{name}", 8)  # less to read ahead after each stop
    found, state = [], None
    for part in [*parts, 3]:
        packed = stream(**of)
        if state is not None:
            packed.load_state_dict(json.loads(state))
        found += first(packed, part)
        state = json.dumps(packed.state_dict())
    assert found == whole_stream(stream, json.dumps(of))[: len(found)] and len(found) == sum(parts) + 3


def whole_stream(stream, of, known={}):  # noqa: B006
    """18 sequences in one go, made once."""
    if of not in known:
        known[of] = first(stream(**json.loads(of)), 18)
    return known[of]


def test_images_alone_come_first_and_predict_nothing(stream):
    found = list(islice(stream(distill_only_sequences=5), 12))
    for sequence in found[:5]:
        assert all((sample["targets"] == -100).all() and "pixel_values" in sample for sample in sequence)
        assert sum(len(sample["input_ids"]) for sample in sequence) > 0.8 * LENGTH
    assert all((sample["targets"] != -100).any() for sequence in found[5:] for sample in sequence)


def test_nothing_is_lost_and_nothing_comes_twice(stream, processor):
    found = Counter()
    for sequence in stream(weights=[50, 30]):
        found.update(answers(processor, sequence))
        if sum(found.values()) > 10 * 80:
            break
    # ten epochs, less those that wait for a row, more those of the next epoch that have been read ahead
    assert len(found) == 80 and set(found.values()) <= {9, 10, 11, 12}, found


def test_ranks_share_the_samples(stream):
    def samples(rank, num_ranks, num_chunks):
        packed = stream(rank=rank, num_ranks=num_ranks)
        return [name for name, _ in islice(packed.named_samples(), num_chunks * CHUNK_SAMPLES)]

    shared = [samples(rank, 2, 4) for rank in (0, 1)]
    chunks = [one[i : i + CHUNK_SAMPLES] for i in range(0, 4 * CHUNK_SAMPLES, CHUNK_SAMPLES) for one in shared]
    assert sum(chunks, []) == samples(0, 1, 8)


def test_samples_of_the_last_sequence_are_named(stream, processor):
    packed = stream(rank=1, num_ranks=2, weights=[3, 1], distill_only_sequences=2)
    names = [name for name, _ in islice(packed.named_samples(), 4 * CHUNK_SAMPLES)]
    for number, sequence in enumerate(islice(packed, 14)):
        found = [packed.name_of(place) for place in packed.last_places]
        assert found == [names[chunk * CHUNK_SAMPLES + index] for chunk, index in packed.last_places]
        assert len(found) == len(sequence)
        if number >= 2:  # where there is something to predict, and it says which row it is
            files = {"a": "images.jsonl", "b": "texts.jsonl"}
            said = [f"{files[answer[0]]}:{answer[1:]}" for answer in answers(processor, sequence)]
            assert [Path(name).name for name in found] == said


def test_weights_are_shares_of_samples_and_each_image_draws_its_budget_and_changes(stream, processor):
    drawn = list(islice(stream(weights=[1, 3]), 150))
    found = Counter(answer[0] for sequence in drawn for answer in answers(processor, sequence))
    assert found["b"] / found.total() == pytest.approx(0.75, abs=0.03)

    def sizes(sequences):
        return {len(one["pixel_values"]) for sequence in sequences for one in sequence if "pixel_values" in one}

    fixed = sizes(islice(stream(image_tokens=(4, 4)), 60))
    augmented = first(stream(image_tokens=(4, 4), augment=[CHANGES, None]), 30)
    changed = [pixels for sequence in augmented for _, pixels in sequence if pixels]
    assert len({*changed}) == len(changed) > 50  # in each epoch anew
    assert min(sizes(drawn)) <= 2 and max(sizes(drawn)) >= 8 and len(sizes(drawn)) >= 5
    assert max(fixed) == 4 and min(fixed) >= 2


def test_what_does_not_fit_is_refused(stream):
    state = stream().state_dict()
    with pytest.raises(ValueError, match="seed was 3 and is 4 now"):
        stream(seed=4).load_state_dict(state)
    with pytest.raises(ValueError, match="weights was"):
        stream(weights=[1, 1]).load_state_dict(state)
    with pytest.raises(ValueError, match="augment was"):
        stream(augment=[CHANGES, None]).load_state_dict(state)
    with pytest.raises(ValueError, match="1 weights for 2 sources"):
        stream(weights=[1])


@pytest.fixture
def spoilt(tmp_path, stream_of):
    """70 rows, of which seven are bad, in a way of their own each."""
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    (tmp_path / "empty.png").write_bytes(b"")
    rows = [{"image": "red.png", "question": f"what? {i}", "answer": "red"} for i in range(70)]
    rows[5]["image"], rows[17]["question"], rows[30]["answer"] = "empty.png", "long " * 200, ""
    rows[31]["image"], rows[32]["image"], rows[33] = "x" * 249, {"bytes": [1, 2]}, {"messages": 7}
    rows[34]["question"] = "\ud83d broken"
    return lambda **options: stream_of(*rows, **options)


def test_a_broken_part_of_a_file_is_a_block_of_bad_rows(tmp_path, stream_of, processor):
    rows = [{"question": f"what is {i}?", "answer": f"{i}"} for i in range(400)]
    file = write(tmp_path / "train.parquet", *rows, row_group_size=40, compression="snappy")
    stream = stream_of(name="train.parquet", max_bad_share=0.3)
    place = pq.ParquetFile(file).metadata.row_group(7).column(0).data_page_offset
    data = bytearray(file.read_bytes())
    data[place : place + 40] = bytes(40)
    file.write_bytes(data)
    seen = Counter(answer for sequence in islice(stream, 220) for answer in answers(processor, sequence))
    assert set(seen) == {str(i) for i in range(400) if not 280 <= i < 320}
    assert len(named(tmp_path)) == 40 and all("cannot be read" in cause for cause in named(tmp_path).values())


def test_bad_samples_are_named_once_skipped_and_count_alike_after_a_restart(spoilt, tmp_path):
    whole, begun = spoilt(), spoilt(num_workers=2)
    list(islice(whole, 40))
    list(islice(begun, 12))
    state = begun.state_dict()
    list(islice(begun, 12))  # goes on, names more, and is killed while it writes
    with (tmp_path / "bad.jsonl").open("a") as file:
        file.write('{"record": "half a li')
    resumed = spoilt()
    resumed.load_state_dict(state)
    list(islice(resumed, 28))
    assert resumed.state_dict() == whole.state_dict()
    causes = named(tmp_path)
    assert "0 bytes" in causes.pop(5) and "exceed the 96 of a packed sequence" in causes.pop(17)
    assert "answer is empty" in causes.pop(30) and causes.keys() == {31, 32, 33, 34}


def test_too_many_bad_samples_stop_the_run(stream_of, folder, processor):
    bad, good = ({"question": "what?", "answer": "red"} | image for image in ({"image": "no.png"}, {}))
    rows = [bad] * 30 + [good] * 30
    with pytest.raises(ValueError, match="samples read are bad.*no.png.*max_bad_share"):
        list(islice(stream_of(*rows), 100))
    list(islice(stream_of(max_bad_share=0.6), 50))
    with pytest.raises(ValueError, match="^1 of the"):
        list(islice(stream_of(max_bad_share=0), 100))
    with pytest.raises(ValueError, match="All of the last .* are bad"):
        next(iter(stream_of(max_samples=2, max_bad_share=1.0)))
    sources = [stream_of(max_samples=5).maker.sources[0], load_source(str(folder / "texts.jsonl"))]
    with pytest.raises(ValueError, match="samples read are bad"):  # however small the source that is all bad
        list(islice(PackedSequences(sources, processor, LENGTH, weights=[1, 4]), 500))


def test_rare_images_are_waited_for_and_text_alone_cannot_be_distilled_from(folder, processor):
    sources = [load_source(str(folder / name), max_samples=10) for name in ("images.jsonl", "texts.jsonl")]
    stream = PackedSequences(sources, processor, LENGTH, weights=[1, 40], distill_only_sequences=2)
    assert len(list(islice(stream, 3))) == 3
    with pytest.raises(ValueError, match="holds an image.*distill_only_steps=0"):
        next(iter(PackedSequences(sources[1:], processor, LENGTH, distill_only_sequences=1)))


def test_workers_that_are_not_forked_get_all_they_need(stream):
    packed = stream()
    chunks = Chunks(packed.maker, packed.mixture, False, 0, 1)
    samples = [chunks[number] for number in (0, 2)]
    again = pickle.loads(pickle.dumps(chunks))
    for number, (expected, _) in samples:
        assert [name for name, _ in again[number][1][0]] == [name for name, _ in expected]


def test_statistics_count_what_training_will_read(spoilt):
    stream = spoilt()
    summary, bad = dataset_statistics(stream, ["it"])
    assert (summary["num_samples"], summary["num_bad"]) == (63, 7)
    numbers = [one["record"].rpartition("train.jsonl:")[2] for one in bad]
    assert numbers == ["5", "17", "30", "31", "32", "33", "34"]
    lengths = [len(s["input_ids"]) for _, s in islice(stream.named_samples(), 63)]
    assert summary["tokens_per_sample"]["max"] == max(lengths)
    assert summary["tokens_per_sample"]["mean"] == pytest.approx(np.mean(lengths))
    packed = [sum(len(s["input_ids"]) for s in sequence) / LENGTH for sequence in islice(stream, 30)]
    assert summary["packing_efficiency"] == pytest.approx(np.mean(packed), abs=0.05)
    parallel, _ = dataset_statistics(stream, ["it"], num_workers=2)
    assert {**parallel, "seconds": 0, "samples_per_second": 0} == {**summary, "seconds": 0, "samples_per_second": 0}


READ_ALL = """
import re, sys
from itertools import islice
import vora
from vora.data.readers import load_source
from vora.data.stream import PackedSequences
source = load_source(sys.argv[1])
processor = vora.VoraProcessor.from_llm(sys.argv[2], patch_size=8, image_size=64)
for row in islice(PackedSequences([source], processor, 256), int(len(source) * 75 / 256)):
    pass
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])  # ru_maxrss would count the parent's
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["parquet", "parquet in one row group", "jsonl", "tar", "arrow"])
def test_memory_does_not_grow_with_the_data(tmp_path, llm_folder, kind):
    peaks = []
    for size in (1000, 10000):
        _write_many(tmp_path / str(size), size, kind)
        peaks.append(int(command_line(tmp_path / str(size), llm_folder, code=READ_ALL).stdout))
    assert peaks[1] < 1.05 * peaks[0], peaks


def _write_many(folder, size, kind):
    folder.mkdir()
    rng, images = np.random.default_rng(0), []
    for number in range(20):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        images.append((folder / f"{number}.png").read_bytes())
    rows = [{"image": images[i % 20], "question": f"what is {i}?", "answer": "noise"} for i in range(size)]
    if kind.startswith("parquet"):
        write(folder / "train.parquet", *rows, row_group_size=100 if kind == "parquet" else size)
    elif kind == "arrow":
        datasets.Dataset.from_list(rows).save_to_disk(folder)
    elif kind == "jsonl":
        write(folder / "train.jsonl", *({**row, "image": f"{i % 20}.png"} for i, row in enumerate(rows)))
    else:
        files = {}
        for number, row in enumerate(rows):
            files[f"{number:06d}.png"] = row.pop("image")
            files[f"{number:06d}.json"] = json.dumps(row).encode()
        write_tar(folder / "train.tar", files)
