"""The OpenAPI description is true: whatever it allows, and much that it does not, is answered as it says."""

import importlib.util
import subprocess
import sys

import pytest
import requests
from http_server import KEY

CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method", "ignored_auth",
)  # fmt: skip
AUTH = {"Authorization": f"Bearer {KEY}"}
RUN = "from schemathesis.cli import schemathesis; schemathesis()"


def test_the_description_has_the_limits_and_the_key(url):
    found = requests.get(f"{url}/openapi.json", headers=AUTH).json()
    asked = found["components"]["schemas"]["ChatRequest"]["properties"]
    assert asked["model"]["enum"] == ["tiny"] and asked["n"]["enum"] == [1, None]
    assert asked["max_tokens"]["maximum"] == 40 and asked["stop"]["maxItems"] == 4
    assert list(found["paths"]["/metrics"]["get"]["responses"]["200"]["content"]) == ["text/plain"]
    assert found["security"] == [{"key": []}] and found["paths"]["/health"]["get"]["security"] == []


@pytest.mark.parametrize("num_cases", [15, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis: pip install '.[fuzz]'")
def test_all_answers_are_described(url, num_cases, tmp_path):
    """Of each route; no 5xx. That whatever the description allows is accepted is not asked: it cannot say which images
    can be read, nor how many tokens texts have."""
    options = ["-H", f"Authorization: Bearer {KEY}", "--checks", ",".join(CHECKS), "--max-examples", str(num_cases)]
    options += ["--phases", "examples,coverage,fuzzing", "--seed", "1", "--suppress-health-check", "all", "--no-color"]
    command = [sys.executable, "-c", RUN, "run", f"{url}/openapi.json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "Tested: 5" in done.stdout
    counted = requests.get(f"{url}/metrics", headers=AUTH).text
    assert 'path="/v1/chat/completions",status="200"' in counted
