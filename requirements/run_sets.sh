#!/usr/bin/env bash
# Tests with the oldest, the tested and the newest libraries, each in a fresh environment; prints a row of a table for
# each. Arguments: which of them, by default all. PYTHON is the interpreter, PYTEST_ADDOPTS more options for pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
logs=runs/sets
mkdir -p "$logs"
failed=0
echo "| set | Python | torch | transformers | peft | result | date |"
echo "| --- | --- | --- | --- | --- | --- | --- |"
for set in ${*:-oldest tested newest}; do
    venv="$scratch/$set" log="$logs/$set.log"
    if "${PYTHON:-python3}" -m venv "$venv" >"$log" 2>&1 &&
        "$venv/bin/pip" install -c "requirements/$set.txt" '.[test]' >>"$log" 2>&1; then
        "$venv/bin/python" -m pytest -q >>"$log" 2>&1 || failed=1
        result=$(tail -n 1 "$log" | tr -d =)
    else
        failed=1 result="not installed: $(tail -n 1 "$log")"
    fi
    versions=$("$venv/bin/python" -c '
import platform
from importlib.metadata import version
print(platform.python_version(), *map(version, ("torch", "transformers", "peft")), sep=" | ")') || versions="| | |"
    echo "| $set | $versions | $result | $(date +%F) |"
    rm -rf "$venv"
done
exit $failed
