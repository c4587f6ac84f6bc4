"""What an adapter's configuration may say: what ours do. All else that PEFT would act on is refused in a line."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vora.build.lora import ALL_OF_PATCH_EMBEDDING
from vora.checkpoint import load_adapter, read_info
from vora.checkpoint.adapter import read_adapter_config
from vora.checkpoint.pretrained import committed_model

OWN = json.loads(Path(committed_model(), "adapter_config.json").read_text())


@pytest.fixture
def folder(tmp_path):
    """A folder whose adapter is of rank 2."""

    def write(config):
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "adapter_config.json").write_text(text)
        save_file({"q_proj.lora_A.weight": torch.zeros(2, 4)}, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return write


def test_ours_are_read(folder):
    for found in (read_adapter_config(Path(committed_model())), read_adapter_config(folder(OWN | {"r": 2}))):
        assert found.lora_alpha == OWN["lora_alpha"] == 56 and found.layers_to_transform == list(range(30))
        assert found.target_modules == set(OWN["target_modules"]) and found.modules_to_save == ["patch_embedding"]
        assert found.init_lora_weights is True and not found.use_dora and found.inference_mode is False
    assert found.r == 2
    others = {"exclude_modules": ALL_OF_PATCH_EMBEDDING, "modules_to_save": ["projector"], "use_rslora": True}
    found = read_adapter_config(folder(OWN | {"r": 2, "option_of_later": None} | others))
    assert {name: getattr(found, name) for name in others} == others


@pytest.mark.parametrize(
    "changes, cause",
    [
        ({"peft_type": "PREFIX_TUNING"}, "peft_type: Input should be 'LORA'"), ({"peft_type": "NEW"}, "peft_type"),
        ({"r": 10**9}, "its rank is 1000000000, but its tensors have [2]"), ({"r": 0}, "r: "), ({"r": "2"}, "r: "),
        ({"r": None}, "r: "), ({"lora_alpha": math.inf}, "lora_alpha"), ({"lora_alpha": -1}, "lora_alpha"),
        ({"init_lora_weights": "eva"}, "it sets init_lora_weights"), ({"loftq_config": {"a": 1}}, "loftq_config"),
        ({"megatron_core": "os", "megatron_config": {"a": 1}}, "it sets megatron_config, megatron_core, which"),
        ({"rank_pattern": {"(a+)+$": 9}}, "rank_pattern"), ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"),
        ({"layer_replication": [[0, 9]]}, "layer_replication"), ({"option_of_later": 1}, "option_of_later"),
        ({"target_modules": "(a+)+$"}, "target_modules"), ({"target_modules": ["(a+)+$"]}, "target_modules.0"),
        ({"layers_pattern": "(a+)+$"}, "layers_pattern"), ({"exclude_modules": "(a+)+$"}, "exclude_modules"),
        ({"layers_to_transform": [-1]}, "layers_to_transform.0"), ({"layers_to_transform": None}, "layers_to_tr"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save.0"),
    ],
)  # fmt: skip
def test_what_ours_do_not_say_is_refused(folder, changes, cause):
    with pytest.raises(ValueError) as caught:
        read_adapter_config(folder(OWN | {"r": 2} | changes))
    message = str(caught.value)
    assert "adapter_config.json describes no vision LoRA of vora" in message and cause in message
    assert "\n" not in message and len(message) < 600


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"r": 2}', "[" * 100_000, '"\\ud800"'])
def test_a_file_that_is_no_configuration_is_refused(folder, text):
    with pytest.raises(ValueError, match="describes no vision LoRA of vora"):
        read_adapter_config(folder(text))


def test_it_is_refused_before_an_llm_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("vora.checkpoint.load.load_llm", None)
    place = folder(OWN | {"r": 2, "use_dora": True})
    (place / "config.json").write_bytes(Path(committed_model(), "config.json").read_bytes())
    with pytest.raises(ValueError, match="it sets use_dora, which our adapters leave alone"):
        read_info(place)  # which has no description of its own
    (place / "vora.json").write_bytes(Path(committed_model(), "vora.json").read_bytes())
    with pytest.raises(ValueError, match="it sets use_dora"):
        load_adapter(place)
