"""Checkpoints of the released code come in with their numbers, and whatever does not fit is named.

One has figures of that code itself; of the others (shapes, depths, LLMs and teachers that nobody has seen) the
original in our own words says what they should compute.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from messages import noise
from original import IMAGE, OriginalVora, save_original, square_frame
from safetensors.torch import load_file, save_file
from tiny import tiny_llm, tiny_tokenizer
from torch.nn.functional import pad, unfold
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from vora import Teacher, VoraImageProcessor, merge_vision_lora
from vora.checkpoint import load_adapter, merge_run
from vora.checkpoint.reference import CLIP_MEAN, CLIP_STD, import_reference, load_reference, text_config_with_biases
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.train.recipe import load_recipe
from vora.train.stages import build_objective

RELEASED = Path(__file__).resolve().parents[3] / "shared" / "reference"
CASES = {
    "attention alone": {"targets": ["self_attn.q_proj", "self_attn.o_proj"]},
    "tied llama": {"family": "llama", "tied": True},
    "mlp of qwen3": {"family": "qwen3", "targets": ["self_attn.v_proj"]},
    "mistral": {"family": "mistral", "llm": {"sliding_window": None}},
    "teacher deeper than LoRA": {"depth": 4, "num_blocks": 2, "teacher_depth": 3},
    "larger patches": {"patch_size": 7, "image_size": 35, "width": 44, "rank": 5},
    "coarse norms": {"llm": {"rms_norm_eps": 0.02}},
    "bfloat16": {"dtype": torch.bfloat16},
    "narrow patches": {"narrow": "vision_embedding."},  # of two precisions the wider one is kept
    "narrow LLM": {"narrow": "llm."},
}


@dataclass
class Checkpoint:
    """A folder with `pretrain`, `merged`, `llm` and `teacher`, and what the original computes of some inputs."""

    folder: Path
    inputs: dict
    logits: dict
    losses: dict

    def load(self, kind="pretrain"):
        return load_reference(self.folder / kind, self.folder / "llm")

    def bring_in(self, out, kind="pretrain", merge=False):
        import_reference(self.folder / kind, self.folder / "llm", out, merge=merge)
        return out

    def our_inputs(self, config):
        """Image tokens spelled out, frames cut into patches."""
        frames, p = self.inputs["frames"], config.patch_size
        patches = unfold(frames, p, stride=p).mT
        given = torch.stack([self.inputs[name] for name in ("input_ids", "labels", "attention_mask")], -1)
        counts = torch.where(given[..., 0] == IMAGE, patches.shape[1], 1) * given[..., 2]
        batch = [row.repeat_interleave(count, 0) for row, count in zip(given, counts)]
        ids, labels, mask = pad_sequence(batch, batch_first=True).unbind(-1)
        return {
            "input_ids": ids.masked_fill(ids == IMAGE, config.image_token_id),
            "attention_mask": mask,
            "labels": labels.masked_fill((ids == IMAGE) | (mask == 0), -100),
            "pixel_values": patches.flatten(0, 1),
            "image_grid_thw": torch.tensor([[1, frames.shape[2] // p, frames.shape[3] // p]] * len(frames)),
        }

    @torch.no_grad()
    def assert_same(self, model, kind="pretrain"):
        inputs = self.our_inputs(model.config)
        found, real = model.float()(**inputs), inputs["attention_mask"].bool()
        assert (found.logits[real] - self.logits[kind][:, : real.shape[1]][real]).abs().max() < 1e-4
        assert abs(found.loss.item() - self.losses["llm_loss"]) < 1e-5


def released():
    inputs, figures = (load_file(RELEASED / f"{name}.safetensors") for name in ("inputs", "expected"))
    losses = json.loads((RELEASED / "expected.json").read_text())["losses"]
    return Checkpoint(RELEASED, inputs, {"pretrain": figures["logits"], "merged": figures["merged_logits"]}, losses)


@torch.no_grad()
def made(
    folder, family="qwen2", depth=3, tied=False, teacher_depth=2, llm=None, dtype=torch.float32, narrow=None, **options
):
    """Of a tiny original whose every tensor differs from its fresh value; matrices whose names begin with `narrow` are
    in bfloat16."""
    torch.manual_seed(3)
    fields = tiny_llm(family).config.to_dict() | {"num_hidden_layers": depth, "tie_word_embeddings": tied}
    fields = {k: v for k, v in (fields | (llm or {})).items() if k not in ("model_type", "layer_types", "dtype")}
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": teacher_depth, "num_attention_heads": 3}
    options = {"width": 20, "patch_size": 4, "image_size": 12, "rank": 3, "num_blocks": 2} | options
    shape |= {name: options[name] for name in ("patch_size", "image_size")}
    original = OriginalVora(
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)),
        teacher=AutoModel.from_config(AutoConfig.for_model("clip_vision_model", **shape)),
        **options,
    ).eval()
    for name, parameter in original.named_parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        is_narrow = narrow and name.startswith(narrow) and not name.endswith(".bias")
        parameter.data = parameter.to(torch.bfloat16 if is_narrow else dtype)  # not the rotary tables
    # two rows, one with its image first and padding behind
    ids = torch.tensor([[11, 12, IMAGE, 13, 14, 15, 16], [IMAGE, 22, 23, 24, 25, 0, 0]])
    seen = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    frames = torch.randn(2, 3, original.image_size, original.image_size)
    labels = torch.where((ids > 12) & (seen == 1), ids, -100)
    inputs = {"input_ids": ids, "attention_mask": seen, "labels": labels, "frames": frames}
    save_original(original, folder / "pretrain")
    found = original.float()(**inputs)
    original.merge()
    save_original(original, folder / "merged")
    return Checkpoint(folder, inputs, {"pretrain": found["logits"], "merged": found["logits"]}, found["metrics"])


def change(folder, change):
    """Change the tensors of a checkpoint where it lies."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Not to be changed by tests."""
    return made(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("case", ["released", *CASES])
def test_logits_and_losses_of_every_level_are_the_originals(case, tmp_path):
    if case == "released" and not RELEASED.exists():
        pytest.skip("needs ../shared/reference, figures of the released code")
    checkpoint = released() if case == "released" else made(tmp_path, **CASES[case])
    reference = checkpoint.load()
    assert reference.model.generation_config.suppress_tokens == [reference.model.config.image_token_id]
    checkpoint.assert_same(reference.with_lora())
    for kind in ("pretrain", "merged"):  # stage 1 stays unmerged, and PEFT itself loads its adapter
        folder = checkpoint.bring_in(tmp_path / f"our-{kind}", kind)
        assert str(checkpoint.folder) not in (folder / "config.json").read_text()
        checkpoint.assert_same(AutoModelForImageTextToText.from_pretrained(folder), kind)

    teacher = Teacher.from_pretrained(checkpoint.folder / "teacher")
    pairs = block_pairs(teacher.num_blocks, teacher.num_blocks, pairing="hidden_states")
    config = reference.model.config
    heads = BlockwiseDistillation(pairs, config.text_config.hidden_size, teacher.hidden_size, center=False)
    heads.load_state_dict(reference.heads)
    normal = {"image_mean": teacher.image_mean, "image_std": teacher.image_std}
    processor = VoraImageProcessor(patch_size=config.patch_size, **normal)
    objective = Objective(load_adapter(tmp_path / "our-pretrain").float(), processor, teacher.float(), heads).eval()
    inputs = checkpoint.our_inputs(config)
    with torch.no_grad():
        found = objective(targets=pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100), **inputs)
    wanted = torch.tensor([checkpoint.losses[f"loss_aux_layer_{level}"] for level in range(teacher.num_blocks)])
    assert (found["pair_losses"] - wanted).abs().max() < 1e-5
    assert abs(found["loss"].item() - checkpoint.losses["total_loss"]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_merges_at_import_or_later_saves_and_reloads(tmp_path, dtype):
    checkpoint = made(tmp_path, dtype=dtype)
    unmerged, now = checkpoint.bring_in(tmp_path / "unmerged"), checkpoint.bring_in(tmp_path / "now", merge=True)
    later, processor = merge_run(unmerged)
    assert processor.pad_to_square and processor.max_image_tokens == 9  # squares, also without a tokenizer
    assert processor.image_mean == list(CLIP_MEAN) and processor.image_std == list(CLIP_STD)
    later.save_pretrained(tmp_path / "later")
    model, again = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("now", "later"))
    state = model.state_dict()
    assert not any("lora" in name or "base_layer" in name for name in state)
    assert state.keys() == again.state_dict().keys() and {tensor.dtype for tensor in state.values()} == {dtype}
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    if dtype == torch.float32:
        opened = merge_vision_lora(AutoModelForImageTextToText.from_pretrained(unmerged))
        with pytest.raises(ValueError, match="holds an adapter"):
            opened.save_pretrained(unmerged)
        for one in (model, opened):
            checkpoint.assert_same(one, "merged")
        assert model.to_llm().config.model_type == "llama" and (now / "README.md").exists()


def test_shards_are_one_checkpoint(plain, tmp_path):
    folder = shutil.copytree(plain.folder / "pretrain", tmp_path / "shards")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_torch_state_dict(tensors, folder, max_shard_size="100KB")
    plain.assert_same(load_reference(folder, plain.folder / "llm").with_lora())
    shard = sorted(folder.glob("model-00002-*.safetensors"))[0]
    shard.write_bytes(b"cut")
    with pytest.raises(ValueError, match="Cannot read .*model-00002"):
        load_reference(folder, plain.folder / "llm")
    shard.unlink()
    with pytest.raises(ValueError, match="lacks 1 of . shards"):
        load_reference(folder, plain.folder / "llm")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (lambda t: t.update({"llm.model.layers.0.mlp.extra.weight": torch.zeros(2)}), "have no place in it"),
        (lambda t: t.update({"something.else": torch.zeros(2)}), "1 tensors that no part .* something.else"),
        (lambda t: t.pop("llm.model.norm.weight"), "1 of 56 tensors are missing, such as .*norm.weight"),
        (lambda t: t.pop("llm.model.layers.2.self_attn.k_proj.bias"), "1 of 56 .*missing, such as .*2.*k_proj.bias"),
        (lambda t: t.pop("llm.model.layers.1.mlp.up_proj.bias"), "1 of 56 .*missing, such as .*1.*up_proj.bias"),
        (lambda t: t.pop("vision_embedding.pos_embed"), "lacks vision_embedding.pos_embed"),
        (lambda t: t.pop("llm.model.layers.1.mlp.up_proj.lora_B.weight"), "no pairs of one rank"),
        (lambda t: t.update({"llm.lm_head.weight": torch.zeros(3, 32)}), "have another shape"),
        (lambda t: t.update({"vision_embedding.pos_embed": torch.zeros(1, 15, 20)}), "no square grid"),
    ],
)
def test_what_does_not_fit_is_named(plain, tmp_path, changes, wanted):
    change(shutil.copytree(plain.folder / "pretrain", tmp_path / "changed"), changes)
    with pytest.raises(ValueError, match=wanted):
        import_reference(tmp_path / "changed", plain.folder / "llm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_named(plain, tmp_path, llm_folder):
    with pytest.raises(ValueError, match="not empty"):
        plain.bring_in(Path(llm_folder))
    with pytest.raises(ValueError, match="holds no config.json"):
        load_reference(tmp_path, llm_folder)
    with pytest.raises(ValueError, match="Is --llm the one it was made from"):
        load_reference(plain.folder / "merged", llm_folder)


def test_biases_without_a_home_are_refused():
    assert text_config_with_biases(AutoConfig.for_model("qwen3"), {"self_attn"}).attention_bias
    for kind, options in (("qwen3", {}), ("gpt_neox", {}), ("qwen2", {"use_sliding_window": True})):
        config = AutoConfig.for_model(kind, **options, max_window_layers=0)
        with pytest.raises(ValueError, match="has no place"):
            text_config_with_biases(config, {"self_attn", "mlp"})


@pytest.mark.parametrize(
    "fields",
    [
        {"lora": None, "vision_attention_mask": None, "rms_norm_eps": None},
        {"lora": {"r": 3, "layers": None, "target_modules": None}},
        {"lora": {"r": 3, "layers": "all", "target_modules": ["mlp.up_proj"]}},
    ],
)
def test_a_configuration_may_say_little(tmp_path, fields):
    checkpoint = made(tmp_path, num_blocks=3, teacher_depth=3)
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps(fields))
    checkpoint.assert_same(checkpoint.load().with_lora())
    change(tmp_path / "pretrain", lambda tensors: tensors.pop("llm.model.layers.2.mlp.up_proj.bias"))
    if (fields["lora"] or {}).get("layers") == "all":
        with pytest.raises(ValueError, match="1 of 56 tensors are missing, such as .*layers.2.mlp.up_proj.bias"):
            checkpoint.load()


def test_tied_embeddings_come_under_either_name_or_both_if_equal(tmp_path):
    checkpoint = made(tmp_path, tied=True)
    head, embeddings = "llm.lm_head.weight", "llm.model.embed_tokens.weight"
    change(tmp_path / "pretrain", lambda tensors: tensors.update({head: tensors.pop(embeddings)}))
    checkpoint.assert_same(checkpoint.load().with_lora())
    change(tmp_path / "pretrain", lambda tensors: tensors.update({embeddings: tensors[head].clone()}))
    reference = checkpoint.load()
    assert reference.model.lm_head.weight is reference.model.get_input_embeddings().weight
    checkpoint.assert_same(reference.with_lora())
    change(tmp_path / "pretrain", lambda tensors: tensors.update({head: tensors[head] + 1}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        checkpoint.load()


def test_the_checkpoints_mask_is_kept(plain, tmp_path):
    folder = shutil.copytree(plain.folder / "pretrain", tmp_path / "masked")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"vision_attention_mask": "causal"}))
    import_reference(folder, plain.folder / "llm", tmp_path / "out")
    assert load_adapter(tmp_path / "out").config.image_attention == "causal"


def test_black_squares_are_the_originals():
    images = {"patch_size": 4, "min_image_tokens": 9, "max_image_tokens": 9}
    for width, height in ((30, 17), (17, 30), (8, 8), (200, 3)):
        processor, image = VoraImageProcessor(pad_to_square=True, **images), noise((width, height))
        found = processor(image, return_tensors="pt")
        patches = unfold(square_frame(image, 12), 4, stride=4).T
        assert found["image_grid_thw"].tolist() == [[1, 3, 3]]
        assert (found["pixel_values"] - patches).abs().max() < 1e-5
        assert processor.get_number_of_image_patches(width, height) == 9


def test_training_goes_on_where_the_released_code_stopped(plain, tmp_path):
    llm = shutil.copytree(plain.folder / "llm", tmp_path / "llm")
    tiny_tokenizer().save_pretrained(llm)
    import_reference(plain.folder / "pretrain", llm, tmp_path / "imported")
    teacher = {"name": str(plain.folder / "teacher"), "pairing": "hidden_states", "center": False}
    values = {
        "model": {"vora": str(tmp_path / "imported")},
        "lora": {"rank": 3},
        "teacher": teacher,
        "data": {"sources": [{"path": "none"}]},
    }
    objective, processor = build_objective(load_recipe(values))
    assert processor.image_processor.pad_to_square
    plain.assert_same(objective.student.eval())
    heads = load_file(plain.folder / "pretrain" / "model.safetensors")
    assert torch.equal(objective.distillation.heads["-1"][1].weight, heads["aux_vision.aux_layer_0.1.weight"])
    with pytest.raises(ValueError, match="teacher.pairing"):
        build_objective(load_recipe(values | {"teacher": {"name": teacher["name"]}}))
