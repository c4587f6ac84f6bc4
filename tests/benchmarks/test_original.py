"""The baseline of the benchmarks computes what the original implementation computes."""

import json
from pathlib import Path

import pytest
import torch
from original import OriginalVora, dense_mask, load_original
from safetensors.torch import load_file
from tiny import tiny_llm
from tiny_teachers import tiny_vit

REFERENCE = Path(__file__).resolve().parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"needs the original's figures in {REFERENCE}")


@pytest.fixture(scope="module")
def figures():
    return load_file(REFERENCE / "inputs.safetensors"), load_file(REFERENCE / "expected.safetensors")


@needs_reference
@pytest.mark.parametrize("folder, name", [("pretrain", "logits"), ("merged", "merged_logits")])
def test_logits_are_those_of_the_original(figures, folder, name):
    inputs, expected = figures
    with torch.no_grad():
        logits = load_original(REFERENCE / folder)(**inputs)["logits"]
    assert logits.shape == expected[name].shape
    for row, length in enumerate(expected["lengths"].tolist()):
        assert (logits[row, :length] - expected[name][row, :length]).abs().max() < 1e-4


@needs_reference
def test_losses_are_those_of_the_original(figures):
    expected = json.loads((REFERENCE / "expected.json").read_text())["losses"]
    found = load_original(REFERENCE / "pretrain")(**figures[0])["metrics"]
    assert found.keys() == expected.keys()
    assert max(abs(found[name] - expected[name]) for name in expected) < 1e-5


@needs_reference
def test_merge_is_the_merge_of_the_original(figures):
    merged = load_original(REFERENCE / "pretrain").merge().state_dict()
    expected = load_file(REFERENCE / "merged" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert max((merged[name] - expected[name]).abs().max() for name in expected) < 1e-6


def test_what_trains():
    teacher = tiny_vit("clip_vision_model")
    sizes = {"width": 20, "patch_size": 4, "image_size": 12, "rank": 3, "num_blocks": 2}
    model = OriginalVora(tiny_llm("llama"), **sizes, teacher=teacher)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = ("lora_A", "lora_B", "bias", "vision_embedding", "aux_layer")
    assert trained and all(any(kind in name for kind in kinds) for name in trained)
    assert "llm.model.layers.0.mlp.up_proj.bias" in trained  # which Llama does not have


def test_mask():
    """t A A t . with padding last: A sees A; nobody sees padding."""
    is_image = torch.tensor([[False, True, True, False, False]])
    mask = dense_mask(torch.tensor([[True, True, True, True, False]]), is_image, torch.float32)
    seen = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert torch.equal(mask[0, 0] == 0, torch.tensor(seen).bool())
