"""`vora serve`: which engine is meant, what it is told, and keys."""

import importlib.util
import json
import os
import stat

import pytest
import torch
from command import vora
from exportable import save_exportable
from http_server import question, served
from openai import BadRequestError, OpenAI

from vora.checkpoint.pretrained import committed_model
from vora.serve import server
from vora.serve.limits import Limits


@pytest.fixture
def vllm_here(tmp_path, monkeypatch):
    """A command `vllm` and a GPU; returns what takes the process's place."""
    command, became = tmp_path / "bin" / "vllm", []
    command.parent.mkdir()
    command.touch()
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(server, "find_spec", lambda name: name == "vllm")

    def exec_(path, words):
        became.append((words, os.environ.get("VLLM_API_KEY")))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", exec_)
    return became


def test_auto_is_vllm_where_it_can_run_the_folder(vllm_here, model_folder):
    choose, adapter_folder = server.choose_engine, committed_model()
    assert choose("auto", model_folder, True) == "vllm" and choose("auto", model_folder, False) == "transformers"
    assert choose("auto", adapter_folder, True) == "transformers" and choose("vllm", adapter_folder, False) == "vllm"


def test_the_command_becomes_vllm(vllm_here, model_folder, monkeypatch):
    base = ["serve", "-m", model_folder, "--engine", "vllm", "--port", "8765"]
    assert "read it, then add --trust-remote-code" in vora(*base).stderr
    trusted = [*base, "--trust-remote-code"]
    assert "--unmerged is not of --engine vllm" in vora(*trusted, "--unmerged").stderr
    assert "vLLM asks for one key, and 2 are given" in vora(*trusted, "--api-key", "a", "--api-key", "b").stderr
    monkeypatch.setenv("VORA_API_KEY", "correct horse")
    assert vora(*trusted, "--dtype", "bfloat16").returncode == 0
    ((words, key),) = vllm_here
    assert words[1:4] == ["serve", str(model_folder), "--trust-remote-code"] and "8765" in words
    assert key == "correct horse"
    assert words[words.index("--dtype") + 1] == "bfloat16"


def test_what_another_engine_would_use_is_refused(model_folder):
    for given, wanted in (
        (["--quant", "q8_0"], "--quant q8_0 is of --engine llama.cpp"),
        (["--api-key", ""], "An API key is empty"),
    ):
        refused = vora("serve", "-m", model_folder, "--engine", "transformers", "--port", "8766", *given)
        assert refused.returncode == 1 and wanted in refused.stderr


@pytest.mark.parametrize("kind", ["transformers", "llama.cpp"])
def test_engines_answer_as_the_generation_config_says_within_the_limit_of_a_prompt(kind, tmp_path):
    if kind == "llama.cpp" and importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("llama.cpp: pip install '.[llamacpp]'")
    folder = save_exportable(tmp_path / "model")
    plain = answer_of(kind, folder)
    config = {"repetition_penalty": 3.0, "do_sample": True, "temperature": 0.2, "top_p": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(config))
    with server.service(kind, str(folder), "m", Limits(max_prompt_tokens=60)) as service:
        assert (service.temperature, service.top_p) == (0.2, 0.5)
        with served(service) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
            with pytest.raises(BadRequestError, match="more than the limit of 60") as found:
                client.chat.completions.create(model="m", messages=question("qz" * 40))
            assert found.value.code == "context_length_exceeded"
            assert said(client) != plain  # which says the same again and again


def answer_of(kind, folder):
    with server.service(kind, str(folder), "m", Limits()) as service, served(service) as url:
        return said(OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0))


def said(client):
    answer = client.chat.completions.create(model="m", messages=question(), temperature=0, max_tokens=24)
    return answer.choices[0].message.content
