"""Checkpoints that nobody has seen: other shapes, depths, LLMs and teachers, made by the original in our own words."""

import json

import numpy as np
import pytest
import torch
from original import IMAGE, OriginalVora, save_original, square_frame
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import tiny_llm
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from vora import VoraImageProcessor
from vora.build.lora import merge_vision_lora
from vora.checkpoint import load_adapter, merge_run
from vora.checkpoint.reference import CLIP_MEAN, CLIP_STD, import_reference, load_reference
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher

CASES = {
    "deeper qwen2": {"family": "qwen2", "depth": 6, "num_blocks": 4, "teacher_depth": 4},
    "tied qwen2": {"family": "qwen2", "tied": True},
    "every block": {"family": "qwen2", "num_blocks": 3, "teacher_depth": 3},
    "attention alone": {"family": "qwen2", "targets": ["self_attn.q_proj", "self_attn.o_proj"]},
    "tied llama": {"family": "llama", "tied": True},
    "mlp of qwen3": {"family": "qwen3", "targets": ["self_attn.v_proj"]},
    "mistral": {"family": "mistral", "llm": {"sliding_window": None}},
    "teacher deeper than LoRA": {"family": "qwen2", "depth": 4, "num_blocks": 2, "teacher_depth": 3},
    "larger patches": {"family": "qwen2", "patch_size": 7, "image_size": 35, "width": 44, "rank": 5},
    "coarse norms": {"family": "qwen2", "llm": {"rms_norm_eps": 0.02}},
    "bfloat16": {"family": "qwen2", "dtype": torch.bfloat16},
}


def original_of(family, depth=3, tied=False, teacher_depth=2, llm=None, dtype=torch.float32, **options):
    """A tiny original whose every tensor differs from its fresh value."""
    torch.manual_seed(3)
    fields = (
        tiny_llm(family).config.to_dict() | {"num_hidden_layers": depth, "tie_word_embeddings": tied} | (llm or {})
    )
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "layer_types", "dtype")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": teacher_depth, "num_attention_heads": 3}
    options = {"width": 20, "patch_size": 4, "image_size": 12, "rank": 3, "num_blocks": 2} | options
    sizes = {"patch_size": options["patch_size"], "image_size": options["image_size"]}
    teacher = AutoModel.from_config(AutoConfig.for_model("clip_vision_model", **shape, **sizes))
    original = OriginalVora(model, teacher=teacher, **options)
    for parameter in original.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
        parameter.data = parameter.data.to(dtype)  # not the rotary tables, which no checkpoint holds
    return original.eval()


def inputs_of(original, image_token_id):
    """Two rows, one with its image first and padding behind: (the original's inputs, ours)."""
    generator = torch.Generator().manual_seed(1)
    side, p = original.image_size, original.patch_size
    ids = torch.tensor([[11, 12, IMAGE, 13, 14, 15, 16], [IMAGE, 22, 23, 24, 25, 0, 0]])
    seen = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    labels = torch.where((ids > 12) & (seen == 1), ids, -100)
    frames = torch.randn(2, 3, side, side, generator=generator)
    grid = side // p
    rows = [[image_token_id] * grid**2 if i == IMAGE else [i] for row in ids.tolist() for i in row]
    ours = [sum(rows[:7], []), sum(rows[7:], [])]
    told = [
        sum(([-100] * grid**2 if i == IMAGE else [t] for i, t in zip(row, wanted)), [])
        for row, wanted in zip(ids.tolist(), labels.tolist())
    ]
    patches = frames.view(2, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5).reshape(2 * grid**2, -1)
    theirs = {"input_ids": ids, "attention_mask": seen, "labels": labels, "frames": frames}
    mask = [[1] * (6 + grid**2), [1] * (4 + grid**2) + [0] * 2]
    return theirs, {
        "input_ids": torch.tensor(ours),
        "attention_mask": torch.tensor(mask),
        "labels": torch.tensor(told),
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, grid, grid]] * 2),
    }


def assert_same(model, original, tolerance=1e-4):
    vora = model.get_base_model() if hasattr(model, "get_base_model") else model
    theirs, ours = inputs_of(original, vora.config.image_token_id)
    with torch.no_grad():
        wanted, found = original.float()(**theirs), model.float()(**ours)
    valid = ours["attention_mask"].bool()
    assert (wanted["logits"][valid] - found.logits[valid]).abs().max() < tolerance
    assert abs(wanted["metrics"]["llm_loss"] - found.loss.item()) < max(1e-5, tolerance / 10)
    return wanted["metrics"]


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_stage_1_and_merged(case, tmp_path):
    original = original_of(**CASES[case])
    save_original(original, tmp_path / "pretrain")
    reference = load_reference(tmp_path / "pretrain", tmp_path / "llm")
    metrics = assert_same(reference.with_lora(), original)
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "out")
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), original)

    teacher = Teacher.from_pretrained(tmp_path / "teacher")
    pairs = block_pairs(teacher.num_blocks, teacher.num_blocks, pairing="hidden_states")
    width = reference.model.config.text_config.hidden_size
    distillation = BlockwiseDistillation(pairs, width, teacher.hidden_size, center=False)
    distillation.load_state_dict(reference.heads)
    processor = VoraImageProcessor(patch_size=original.patch_size)
    peft_model = load_reference(tmp_path / "pretrain", tmp_path / "llm").with_lora().float()
    learner = Objective(peft_model, processor, teacher.float(), distillation).eval()
    _, ours = inputs_of(original, learner.config.image_token_id)
    labels = ours.pop("labels")
    losses = learner(targets=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), **ours)
    wanted = torch.tensor([metrics[f"loss_aux_layer_{level}"] for level in range(teacher.num_blocks)])
    assert (losses["pair_losses"] - wanted).abs().max() < 1e-5
    assert abs(losses["loss"].item() - metrics["total_loss"]) < 2e-5

    original.merge()
    save_original(original, tmp_path / "merged")
    import_reference(tmp_path / "merged", tmp_path / "llm", tmp_path / "merged-out")
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged-out"), original)


def test_tied_embeddings_under_either_name(tmp_path):
    original = original_of("qwen2", tied=True)
    save_original(original, tmp_path / "pretrain")
    file = tmp_path / "pretrain" / "model.safetensors"
    tensors = load_file(file)
    tensors["llm.lm_head.weight"] = tensors.pop("llm.model.embed_tokens.weight")
    save_file(tensors, file)
    model = load_reference(tmp_path / "pretrain", tmp_path / "llm").model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert_same(load_reference(tmp_path / "pretrain", tmp_path / "llm").with_lora(), original)


def rewritten(folder, change):
    """Change the tensors of a checkpoint where it lies."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "fields",
    [{}, {"lora": None, "vision_attention_mask": None}, {"lora": {"r": 3, "layers": None, "target_modules": None}}],
)
def test_a_configuration_may_say_nothing(tmp_path, fields):
    original = original_of("qwen2")
    save_original(original, tmp_path / "pretrain")
    (tmp_path / "pretrain" / "config.json").write_text(json.dumps(fields))
    assert_same(load_reference(tmp_path / "pretrain", tmp_path / "llm").with_lora(), original)


def test_all_layers(tmp_path):
    original = original_of("qwen2", num_blocks=3, teacher_depth=3)
    save_original(original, tmp_path / "pretrain")
    file = tmp_path / "pretrain" / "config.json"
    fields = json.loads(file.read_text())
    fields["lora"]["layers"] = "all"
    file.write_text(json.dumps(fields))
    assert_same(load_reference(tmp_path / "pretrain", tmp_path / "llm").with_lora(), original)
    rewritten(tmp_path / "pretrain", lambda tensors: tensors.pop("llm.model.layers.2.mlp.up_proj.bias"))
    with pytest.raises(ValueError, match="1 of 56 tensors are missing, such as .*layers.2.mlp.up_proj.bias"):
        load_reference(tmp_path / "pretrain", tmp_path / "llm")


def test_tied_embeddings_that_differ_are_refused(tmp_path):
    original = original_of("qwen2", tied=True)
    save_original(original, tmp_path / "pretrain")
    head = original.llm.lm_head.weight.detach()
    rewritten(tmp_path / "pretrain", lambda tensors: tensors.update({"llm.lm_head.weight": head.clone()}))
    assert_same(load_reference(tmp_path / "pretrain", tmp_path / "llm").with_lora(), original)
    rewritten(tmp_path / "pretrain", lambda tensors: tensors.update({"llm.lm_head.weight": head + 1}))
    with pytest.raises(ValueError, match="set tie_word_embeddings to false"):
        load_reference(tmp_path / "pretrain", tmp_path / "llm")


@pytest.mark.parametrize("narrow", ["vision_embedding.", "llm."])
@torch.no_grad()
def test_of_two_precisions_the_wider_one_is_kept(tmp_path, narrow):
    original = original_of("qwen2")
    for name, parameter in original.named_parameters():
        if name.startswith(narrow) and not name.endswith(".bias"):
            parameter.data = parameter.bfloat16().float()
    save_original(original, tmp_path / "pretrain")

    def halve(tensors):
        found = [name for name in tensors if name.startswith(narrow) and not name.endswith(".bias")]
        tensors.update({name: tensors[name].bfloat16() for name in found})

    rewritten(tmp_path / "pretrain", halve)
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "out")
    assert_same(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"), original)


def test_a_merged_model_has_one_precision(tmp_path):
    save_original(original_of("qwen2", dtype=torch.bfloat16), tmp_path / "pretrain")
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "now", merge=True)
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "unmerged")
    merge_vision_lora(load_adapter(tmp_path / "unmerged")).save_pretrained(tmp_path / "later")
    for folder in ("now", "later"):
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / folder)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_merged_model_is_not_saved_over_its_adapter(tmp_path):
    save_original(original_of("qwen2"), tmp_path / "pretrain")
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "out")
    model = merge_vision_lora(AutoModelForImageTextToText.from_pretrained(tmp_path / "out"))
    with pytest.raises(ValueError, match="holds an adapter"):
        model.save_pretrained(tmp_path / "out")


def test_merging_keeps_the_squares_of_a_model_without_a_tokenizer(tmp_path):
    save_original(original_of("qwen2"), tmp_path / "pretrain")
    import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / "out")
    _, processor = merge_run(tmp_path / "out")
    assert processor.pad_to_square and processor.max_image_tokens == 9
    assert processor.image_mean == list(CLIP_MEAN) and processor.image_std == list(CLIP_STD)


def test_the_checkpoints_mask_is_kept_and_no_answer_holds_a_image(tmp_path):
    save_original(original_of("qwen2"), tmp_path / "pretrain")
    file = tmp_path / "pretrain" / "config.json"
    for mask in ("causal", "bidirectional"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_attention_mask": mask}))
        import_reference(tmp_path / "pretrain", tmp_path / "llm", tmp_path / mask)
        opened = [AutoModelForImageTextToText.from_pretrained(tmp_path / mask), load_adapter(tmp_path / mask)]
        for model in opened:
            assert model.config.image_attention == mask
            assert model.generation_config.suppress_tokens == [model.config.image_token_id]


@pytest.mark.parametrize("size", [(30, 17), (17, 30), (8, 8), (200, 3)])
def test_black_squares_are_the_originals(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    looks = {"patch_size": 4, "min_image_tokens": 9, "max_image_tokens": 9}
    found = VoraImageProcessor(pad_to_square=True, **looks)(Image.fromarray(pixels), return_tensors="pt")
    frame = square_frame(Image.fromarray(pixels), 12)
    patches = frame.view(3, 3, 4, 3, 4).permute(1, 3, 0, 2, 4).reshape(9, -1)
    assert found["image_grid_thw"].tolist() == [[1, 3, 3]]
    assert (found["pixel_values"] - patches).abs().max() < 1e-5
    assert VoraImageProcessor(pad_to_square=True, **looks).get_number_of_image_patches(*size) == 9
