"""Many mixed clients at once: nobody is lost, mixed up or stalled."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "serve.py"


def test_64_mixed_clients_get_what_they_would_get_alone(exportable_folder, tmp_path):
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    options = ["-m", exportable_folder, "--minutes", "0.5", "--clients", "64", "--max-tokens", "24", "--threads", "1"]
    options += ["--port", port, "--dtype", "float32", "--out", tmp_path / "figures.json"]
    subprocess.run([sys.executable, BENCHMARK, *map(str, options)], check=True, timeout=300)
    outcomes = json.loads((tmp_path / "figures.json").read_text())
    assert set(outcomes) <= {"as alone", "broken off by us", "wrong and refused"} and outcomes["as alone"] > 64
