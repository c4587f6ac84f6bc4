"""A coverage-guided fuzzer of what reads images and data: `fuzz_readers.py KIND [FOLDER] [arguments of libFuzzer]`.

KIND is image, frames, or the ending of a data file: jsonl, json, csv, tsv, parquet, arrow, tar. It begins with small
good files of that kind, and keeps in FOLDER what found new code. Needs atheris (`pip install atheris`), no dependency
of the project. Any error but a ValueError is a find; libFuzzer keeps the input and shows the traceback. Without
`-max_total_time=SECONDS` it goes on until Ctrl-C.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["vora.data", "vora.model.fetch_image", "vora.model.to_rgb"]):
    from vora.data.readers import load_source
    from vora.model.fetch_image import fetch_frames, fetch_image

sys.path[:0] = [str(Path(__file__).parents[1] / part) for part in ("", "tests", "tests/data")]
from benchmarks.hostile import GOOD_ROWS  # noqa: E402
from tests.model.image_fuzz import POLICY, originals  # noqa: E402


def read_image(content: bytes, use: Callable[..., Any]) -> None:
    with suppress(ValueError):
        use(content, policy=POLICY)


def read_rows(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    with suppress(ValueError):
        source = load_source(str(file))
        for number in range(len(source)):
            with suppress(ValueError):
                source[number]


def write_seeds(kind: str, folder: Path) -> None:
    """Good files, from which the fuzzer goes on: it would not come upon a header of Parquet by itself."""
    rows = [{name: json.dumps(value) for name, value in row.items()} for row in GOOD_ROWS]
    if kind in ("image", "frames"):
        for number, content in enumerate(originals()):
            (folder / str(number)).write_bytes(content)
    elif kind == "tar":
        from tests.data.test_readers import write_tar

        write_tar(folder / "0", {"0.png": originals()[0], "0.txt": b"a", "1.json": json.dumps(GOOD_ROWS[0]).encode()})
    elif kind in ("parquet", "arrow"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        for number, row in enumerate(rows):
            table, file = pa.Table.from_pylist([row] * 3), folder / str(number)
            if kind == "parquet":
                pq.write_table(table, file, row_group_size=2)
            else:
                with pa.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
    else:
        mark = "\t" if kind == "tsv" else ","
        texts = {
            "jsonl": ["\n".join(map(json.dumps, GOOD_ROWS))],
            "json": [json.dumps(GOOD_ROWS)],
        }.get(kind) or [mark.join(row) + "\n" + mark.join(map(json.dumps, row.values())) for row in rows]
        for number, text in enumerate(texts):
            (folder / str(number)).write_text(text)


def main() -> None:
    kind = sys.argv.pop(1)
    uses = {"image": fetch_image, "frames": fetch_frames}
    with tempfile.TemporaryDirectory() as folder:
        file, seeds = Path(folder, f"data.{kind}"), Path(folder, "seeds")
        seeds.mkdir()
        write_seeds(kind, seeds)
        arguments = [*sys.argv, str(seeds)]  # the first folder is written to
        atheris.Setup(arguments, lambda data: read_image(data, uses[kind]) if kind in uses else read_rows(data, file))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
