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


@needs_reference
def test_logits_losses_and_merge_are_those_of_the_original():
    inputs, expected = (load_file(REFERENCE / f"{name}.safetensors") for name in ("inputs", "expected"))
    pretrain = load_original(REFERENCE / "pretrain")
    found = pretrain(**inputs)
    losses = json.loads((REFERENCE / "expected.json").read_text())["losses"]
    assert found["metrics"].keys() == losses.keys()
    assert max(abs(found["metrics"][name] - losses[name]) for name in losses) < 1e-5
    with torch.no_grad():
        logits = {"logits": found["logits"], "merged_logits": load_original(REFERENCE / "merged")(**inputs)["logits"]}
    for name, found in logits.items():
        assert found.shape == expected[name].shape
        for row, length in enumerate(expected["lengths"].tolist()):
            assert (found[row, :length] - expected[name][row, :length]).abs().max() < 1e-4
    merged, weights = pretrain.merge().state_dict(), load_file(REFERENCE / "merged" / "model.safetensors")
    assert merged.keys() == weights.keys()
    assert max((merged[name] - weights[name]).abs().max() for name in weights) < 1e-6


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
