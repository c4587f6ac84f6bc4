"""The baseline of the benchmarks computes what the original implementation computes."""

import json
from pathlib import Path

import pytest
import torch
from original import IMAGE, OriginalVora, dense_mask, load_original, save_original
from safetensors.torch import load_file
from tiny import tiny_llm
from transformers import AutoConfig, AutoModel

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


def random_original(tied=False, **changes):
    """A tiny original with a teacher, whose pairs, positions and biases are all different from 0."""
    torch.manual_seed(0)
    llm = tiny_llm("llama")
    if tied:
        llm.config.tie_word_embeddings = True
        llm.lm_head.weight = llm.model.embed_tokens.weight
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 3}
    teacher = AutoModel.from_config(AutoConfig.for_model("clip_vision_model", **shape, patch_size=4, image_size=12))
    options = {"width": 20, "patch_size": 4, "image_size": 12, "rank": 3, "num_blocks": 2, "teacher": teacher}
    model = OriginalVora(llm, **options | changes).eval()
    torch.nn.init.normal_(model.vision_embedding.pos_embed)
    for layer in model.lora_layers:
        if layer.rank is not None:
            torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    return model


def inputs_of_two_rows():
    ids = torch.tensor([[11, 12, IMAGE, 13, 14, 15], [21, IMAGE, 22, 23, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    labels = torch.where((ids > 12) & (ids < 24) & (ids != 21), ids, -100)
    frames = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "frames": frames}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True},
        {"num_blocks": 3, "targets": ["self_attn.q_proj", "mlp.down_proj"]},
        {"rank": None, "teacher": None},
    ],
    ids=["plain", "tied", "two targets in all blocks", "merged"],
)
def test_a_saved_checkpoint_reads_back(tmp_path, changes):
    model, inputs = random_original(**changes), inputs_of_two_rows()
    save_original(model, tmp_path / "checkpoint")
    again = load_original(tmp_path / "checkpoint")
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(**inputs)["logits"], model(**inputs)["logits"])


def test_merging_keeps_the_logits():
    model, inputs = random_original(), inputs_of_two_rows()
    with torch.no_grad():
        before = model(**inputs)["logits"]
        after = model.merge()(**inputs)["logits"]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=0)


def test_what_trains():
    trained = {name for name, parameter in random_original().named_parameters() if parameter.requires_grad}
    kinds = ("lora_A", "lora_B", "bias", "vision_embedding", "aux_layer")
    assert trained and all(any(kind in name for kind in kinds) for name in trained)
    assert "llm.model.layers.0.mlp.up_proj.bias" in trained  # which Llama does not have


def test_mask():
    """t A A t . with padding last: A sees A; nobody sees padding."""
    is_image = torch.tensor([[False, True, True, False, False]])
    mask = dense_mask(torch.tensor([[True, True, True, True, False]]), is_image, torch.float32)
    seen = [[1, 0, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    assert torch.equal(mask[0, 0] == 0, torch.tensor(seen).bool())
