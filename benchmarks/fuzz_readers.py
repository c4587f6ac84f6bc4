"""A coverage-guided fuzzer of what reads images and data: `fuzz_readers.py KIND [arguments of libFuzzer]`.

KIND is image, frames, or the ending of a data file: jsonl, json, csv, tsv, parquet, arrow, tar. Needs atheris, no
dependency of the project. Any error but a ValueError is a find; libFuzzer keeps the input and shows the traceback.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["vora.data", "vora.model.fetch_image", "vora.model.to_rgb"]):
    from vora.data.readers import load_source
    from vora.model.fetch_image import ImagePolicy, fetch_frames, fetch_image

POLICY = ImagePolicy(max_pixels=2_000_000, max_video_pixels=8_000_000, max_frames=50)


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


def main() -> None:
    kind = sys.argv.pop(1)
    uses = {"image": fetch_image, "frames": fetch_frames}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"data.{kind}")
        atheris.Setup(sys.argv, lambda data: read_image(data, uses[kind]) if kind in uses else read_rows(data, file))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
