"""What the tests of evaluation share: the command in this process, and data of every task."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import vora


@pytest.fixture
def command(monkeypatch):
    """`vora` in this process, with arguments: its exit status."""
    from vora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0

    return run


@pytest.fixture
def report_of(command, model_folder, tmp_path):
    """`vora eval` of the tiny model: (task, data, further options) to its report."""

    def run(task, data, *options, model=model_folder, name="r"):
        out = tmp_path / f"{name}.json"
        paths = data if isinstance(data, (list, tuple)) else [data]
        assert command("eval", "-m", model, "--task", task, "-o", out, *options, "--data", *paths) == 0
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def seeing(llm_folder):
    """A tiny model that is sure of its answers, its processor, and four images of noise."""
    torch.manual_seed(0)
    model = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
    for parameter in model.parameters():
        parameter.data *= 1.5
    processor = vora.VoraProcessor.from_llm(llm_folder, patch_size=4, image_size=12)
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 255, (8, 4 * n, 3), dtype=np.uint8)) for n in (1, 2, 3, 4)]
    return model, processor, images


@pytest.fixture(scope="session")
def png():
    """A small image of noise as a column has it: bytes and a name."""

    def make(number):
        noise = np.random.default_rng(number).integers(0, 255, (8, 12, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(noise).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": f"{number}.png"}

    return make


def written(file, rows, png, **options):
    """A Parquet file of rows, each with an image of its own unless it names one."""
    pq.write_table(pa.Table.from_pylist([{"image": png(n), **row} for n, row in enumerate(rows)]), file, **options)
    return file


@pytest.fixture
def parquet(tmp_path, png):
    return lambda name, rows: written(tmp_path / f"{name}.parquet", rows, png)


@pytest.fixture(scope="session")
def task_data(tmp_path_factory, png):
    """A folder with `TASK.parquet` of every task, 14 images each in row groups of three."""
    count = 14
    layouts = {
        "captions": [{"captions": [f"a dog number {n}", f"the {n} is red"]} for n in range(count)],
        "vqa": [{"questions": ["what?", "is it red?"], "answers": [f"cup {n}", "yes"]} for n in range(count)],
        "classify": [{"label": ("red", "blue", "green square")[n % 3]} for n in range(count)],
        "statements": [
            {"sentence": f"it is {n % 12}", "label": n % 2 < 1, "identifier": f"{n}-0"} for n in range(count)
        ],
    }
    folder = tmp_path_factory.mktemp("tasks")
    for task, rows in layouts.items():
        written(folder / f"{task}.parquet", rows, png, row_group_size=3)
    return folder
