"""What vLLM's Transformers backend asks of a merged folder, and how verify gives it prompts; vLLM is not needed."""

import json
import sys

import pytest
import torch
from exportable import tiny_exportable
from messages import noise

from vora.export.prompts import images_to_compare, make_prompt, squared
from vora.export.vllm import PYTHON, Vllm


@pytest.fixture(scope="module")
def pair():
    return tiny_exportable()


def test_a_folder_has_what_the_backend_reads(pair, tmp_path):
    model, processor = pair
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_vora.VoraModel" and config["is_mm_prefix_lm"] is True
    assert config["image_token_id"] < config["text_config"]["vocab_size"]
    sizes = [(16, 24), (24, 24), (40, 16)]
    inputs = processor.image_processor([noise(size[::-1], 0) for size in sizes], return_tensors="pt")
    counted = processor._get_num_multimodal_tokens(image_sizes=sizes)
    replaced = [processor.replace_image_token(inputs, index).count(processor.image_token) for index in range(3)]
    assert replaced == counted["num_image_tokens"]
    assert counted["num_image_patches"] == inputs["image_grid_thw"].prod(-1).tolist()


def test_image_features_are_one_tensor_for_each_image(pair):
    model, processor = pair
    images = [noise((16, 24), 0), noise((24, 24), 1)]
    inputs = processor.image_processor(images, return_tensors="pt")
    with torch.no_grad():
        together = model.model.get_image_features(**inputs, return_dict=True)
        alone = [
            model.get_image_features(**processor.image_processor(one, return_tensors="pt")).last_hidden_state
            for one in images
        ]
    assert len(together.pooler_output) == 2 and len(together.pooler_output[0]) != len(together.pooler_output[1])
    for found, expected in zip(together.pooler_output, alone, strict=True):
        torch.testing.assert_close(found, expected)
    assert torch.equal(torch.cat(together.pooler_output), together.last_hidden_state)


def test_prompts_have_one_image_token_which_vllm_repeats(pair, tmp_path, monkeypatch):
    model, processor = pair
    prompt = make_prompt(processor, squared(processor, images_to_compare([])[0], 24), "what?")
    ids = Vllm(tmp_path, model.config.image_token_id)._with_one_token(prompt, [7, 8])
    assert ids.count(model.config.image_token_id) == 1 and ids[-2:] == [7, 8]
    num_tokens = int(prompt.inputs["image_grid_thw"].prod()) // 4
    assert len(ids) == prompt.length - num_tokens + 1 + 2
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(ValueError, match="vLLM does not read .*ModuleNotFoundError.*vllm.*VORA_VLLM_PYTHON names"):
        Vllm(tmp_path, model.config.image_token_id).read([prompt], [[7, 8]])
