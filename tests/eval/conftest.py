"""What the tests of evaluation share: reports, a model, and data of every task."""

import io
import json
import sys

import command
import pytest
import torch
from messages import noise
from test_readers import write

import vora


@pytest.fixture
def report_of(model_folder, tmp_path):
    """`vora eval` of the tiny model: (task, data, further options) to its report."""

    def run(task, data, *options, model=model_folder, name="r"):
        out = tmp_path / f"{name}.json"
        paths = data if isinstance(data, (list, tuple)) else [data]
        ran = command.vora("eval", "-m", model, "--task", task, "-o", out, *options, "--data", *paths)
        assert ran.returncode == 0, ran.stderr
        print(ran.stderr, file=sys.stderr)
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def seeing(llm_folder, processor):
    """A tiny model that is sure of its answers, its processor, and four images of noise."""
    torch.manual_seed(0)
    model = vora.VoraForConditionalGeneration.from_llm(llm_folder, patch_size=4, image_size=12)
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model, processor, [noise((4 * n, 8), n) for n in (1, 2, 3, 4)]


@pytest.fixture(scope="session")
def png():
    """A small image of noise as a column has it: bytes and a name."""

    def make(number):
        file = io.BytesIO()
        noise((12, 8), number).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": f"{number}.png"}

    return make


def written(file, rows, png, **options):
    """A Parquet file of rows, each with an image of its own unless it names one."""
    return write(file, *({"image": png(n), **row} for n, row in enumerate(rows)), **options)


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
