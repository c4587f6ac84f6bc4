"""Many mixed clients at once: nobody is lost, mixed up or stalled."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_64_mixed_clients_get_what_they_would_get_alone(exportable_folder, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["-m", exportable_folder, "--minutes", "0.5", "--clients", "64", "--max-tokens", "24", "--threads", "1"]
    options += ["--port", port, "--dtype", "float32", "--out", tmp_path / "figures.json"]
    subprocess.run([sys.executable, BENCHMARKS / "serve.py", *map(str, options)], check=True, timeout=300)
    outcomes = json.loads((tmp_path / "figures.json").read_text())
    assert set(outcomes) <= {"as alone", "broken off by us", "wrong and refused"} and outcomes["as alone"] > 64


def test_llama_cpp_is_timed_beside_transformers(exportable_folder, tmp_path):
    pytest.importorskip("xllamacpp")
    options = ["-m", exportable_folder, "--rounds", "1", "--new-tokens", "2", "--words", "4", "--threads", "1"]
    command = [sys.executable, BENCHMARKS / "llama_cpp.py", *options, "--json", tmp_path / "rows.json"]
    subprocess.run([*map(str, command)], check=True, timeout=300)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == 4 and all(one["ours"] > 0 and one["baseline"] > 0 for one in rows)
