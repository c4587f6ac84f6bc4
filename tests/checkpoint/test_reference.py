"""Checkpoints of the released code come in with their numbers, and whatever does not fit is named."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2Config

import vora
from vora.checkpoint import load_adapter
from vora.checkpoint.reference import import_reference, load_reference, text_config_with_biases
from vora.distill.blockwise import BlockwiseDistillation, block_pairs
from vora.distill.objective import Objective
from vora.distill.teacher import Teacher

SHARED = Path(__file__).resolve().parents[3] / "shared" / "reference"
pytestmark = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/reference, figures of the released code")
KINDS = {"pretrain": "logits", "merged": "merged_logits"}


def our_inputs(image_token_id, labels=True):
    """The reference's inputs in our form: image tokens spelled out, frames cut into patches."""
    given = load_file(SHARED / "inputs.safetensors")
    frames = given["frames"]
    images, channels, height, width = frames.shape
    rows, columns = height // 14, width // 14
    patches = frames.view(images, channels, rows, 14, columns, 14).permute(0, 2, 4, 1, 3, 5)
    ids, targets = [], []
    for row, seen, label in zip(given["input_ids"], given["attention_mask"], given["labels"]):
        pieces = [
            ([image_token_id] * rows * columns, [-100] * rows * columns) if token == -200 else ([token], [wanted])
            for token, real, wanted in zip(row.tolist(), seen.tolist(), label.tolist())
            if real
        ]
        ids.append(sum((piece for piece, _ in pieces), []))
        targets.append(sum((piece for _, piece in pieces), []))
    longest = max(map(len, ids))

    def padded(lists, value):
        return torch.tensor([one + [value] * (longest - len(one)) for one in lists])

    return {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(one) for one in ids], 0),
        "pixel_values": patches.reshape(images * rows * columns, -1),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * images),
        "labels": padded(targets, -100),
    }


def expected(kind):
    return load_file(SHARED / "expected.safetensors")[KINDS[kind]], json.loads((SHARED / "expected.json").read_text())


@torch.no_grad()
def assert_same(model, kind):
    inputs = our_inputs(vora_of(model).config.image_token_id)
    outputs, (logits, figures) = model(**inputs), expected(kind)
    for row, length in enumerate(inputs["attention_mask"].sum(-1).tolist()):
        assert (outputs.logits[row, :length] - logits[row, :length]).abs().max() < 1e-4
    assert abs(outputs.loss.item() - figures["losses"]["llm_loss"]) < 1e-5


def vora_of(model):
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    for kind in KINDS:
        import_reference(SHARED / kind, SHARED / "llm", folder / kind)
    return folder


def opened(imported, kind):
    """Stage 1 stays unmerged, and PEFT itself loads its adapter."""
    return (load_adapter if kind == "pretrain" else AutoModelForImageTextToText.from_pretrained)(imported / kind)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_loss_are_the_released_codes(imported, kind):
    model = opened(imported, kind)
    assert vora_of(model).config.text_config.model_type == "llama"
    assert str(SHARED) not in (imported / kind / "config.json").read_text()
    assert_same(model, kind)


@torch.no_grad()
def test_losses_of_every_level_are_the_released_codes():
    reference, figures = load_reference(SHARED / "pretrain", SHARED / "llm"), expected("pretrain")[1]["losses"]
    teacher = Teacher.from_pretrained(SHARED / "teacher")
    pairs = block_pairs(teacher.num_blocks, teacher.num_blocks, pairing="hidden_states")
    distillation = BlockwiseDistillation(pairs, 64, teacher.hidden_size, center=False)
    distillation.load_state_dict(reference.heads)
    images = vora.VoraImageProcessor(image_mean=teacher.image_mean, image_std=teacher.image_std)
    objective = Objective(reference.with_lora(), images, teacher, distillation).eval()
    inputs = our_inputs(objective.config.image_token_id)
    labels = inputs.pop("labels")
    losses = objective(targets=torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100), **inputs)
    wanted = [figures[f"loss_aux_layer_{level}"] for level in range(4)]
    assert (losses["pair_losses"] - torch.tensor(wanted)).abs().max() < 1e-5
    assert abs(losses["loss"].item() - figures["total_loss"]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_saves_reloads_merges_and_generates(imported, tmp_path, kind):
    model = opened(imported, kind)
    assert_same(model, kind)
    if kind == "pretrain":
        model = vora.merge_vision_lora(model)
    model.save_pretrained(tmp_path / "merged")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    assert_same(model, "merged")
    llm = model.to_llm()
    ids = torch.tensor([[7, 8, 9]])
    assert torch.equal(llm(input_ids=ids).logits, model(input_ids=ids).logits)
    inputs = our_inputs(model.config.image_token_id)
    inputs = {"input_ids": inputs["input_ids"][:1, :20], "pixel_values": inputs["pixel_values"][:16],
              "image_grid_thw": inputs["image_grid_thw"][:1]}  # fmt: skip
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert answer.shape == (1, 24) and model.config.image_token_id not in answer[0, 20:]


def test_merging_at_import_is_merging_later(imported, tmp_path):
    import_reference(SHARED / "pretrain", SHARED / "llm", tmp_path / "now", merge=True)
    now = AutoModelForImageTextToText.from_pretrained(tmp_path / "now").state_dict()
    later = vora.merge_vision_lora(load_adapter(imported / "pretrain")).state_dict()
    assert now.keys() == later.keys() and all(torch.equal(now[name], later[name]) for name in now)


@pytest.mark.parametrize("kind", KINDS)
def test_remote_code_needs_no_package(imported, kind):
    code = (
        "import sys, torch; sys.modules['vora'] = None\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(imported / kind)!r}, trust_remote_code=True)\n"
        "assert 'vora.' not in type(model).__module__\n"
        "print(model(input_ids=torch.tensor([[7, 8, 9]])).logits.sum().item())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    model = AutoModelForImageTextToText.from_pretrained(imported / kind)
    assert abs(float(ran.stdout) - model(input_ids=torch.tensor([[7, 8, 9]])).logits.sum().item()) < 1e-2


def changed(tmp_path, change, kind="pretrain"):
    """A copy of a reference checkpoint whose tensors were changed."""
    shutil.copytree(SHARED / kind, tmp_path / "changed")
    (tmp_path / "changed").chmod(0o755)
    file = tmp_path / "changed" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()
    save_file(tensors, file)
    return tmp_path / "changed"


def test_shards_are_one_checkpoint(tmp_path):
    folder = changed(tmp_path, lambda tensors: None)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in shards.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(load_reference(folder, SHARED / "llm").with_lora(), "pretrain")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="lacks 1 of 2 shards"):
        load_reference(folder, SHARED / "llm")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: t.update({"llm.model.layers.0.mlp.extra.weight": torch.zeros(2)}), "have no place in it"),
        (lambda t: t.update({"something.else": torch.zeros(2)}), "1 tensors that no part .* something.else"),
        (lambda t: t.pop("llm.model.norm.weight"), "1 of 88 tensors are missing, such as .*norm.weight"),
        (lambda t: t.pop("llm.model.layers.4.self_attn.k_proj.bias"), "1 of 88 .*missing, such as .*4.*k_proj.bias"),
        (lambda t: t.pop("llm.model.layers.0.mlp.up_proj.bias"), "1 of 88 .*missing, such as .*0.*up_proj.bias"),
        (lambda t: t.pop("vision_embedding.pos_embed"), "lacks vision_embedding.pos_embed"),
        (lambda t: t.pop("llm.model.layers.3.mlp.up_proj.lora_B.weight"), "no pairs of one rank"),
        (lambda t: t.update({"llm.lm_head.weight": torch.zeros(3, 64)}), "have another shape"),
        (lambda t: t.update({"vision_embedding.pos_embed": torch.zeros(1, 15, 40)}), "no square grid"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, change, wanted):
    with pytest.raises(ValueError, match=wanted):
        import_reference(changed(tmp_path, change), SHARED / "llm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_named(tmp_path, llm_folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        import_reference(SHARED / "merged", SHARED / "llm", tmp_path / "full")
    with pytest.raises(ValueError, match="holds no config.json"):
        load_reference(tmp_path / "full", SHARED / "llm")
    with pytest.raises(ValueError, match="Is --llm the one it was made from"):
        load_reference(SHARED / "merged", llm_folder)


def test_biases_without_a_home_are_refused():
    from transformers import GPTNeoXConfig, Qwen3Config

    assert text_config_with_biases(Qwen3Config(), {"self_attn"}).attention_bias
    for config in (Qwen3Config(), GPTNeoXConfig(), Qwen2Config(use_sliding_window=True, max_window_layers=0)):
        with pytest.raises(ValueError, match="has no place"):
            text_config_with_biases(config, {"self_attn", "mlp"})


def test_training_goes_on_where_the_released_code_stopped(imported, tmp_path):
    from vora.train.recipe import load_recipe
    from vora.train.stages import build_objective

    folder = tmp_path / "with-words"
    shutil.copytree(imported / "pretrain", folder)
    images = vora.VoraImageProcessor.from_pretrained(folder)
    (folder / "preprocessor_config.json").unlink()
    import tiny

    vora.VoraProcessor.from_llm(tiny.tiny_tokenizer(), **{k: v for k, v in images.to_dict().items() if k in (
        "patch_size", "min_image_tokens", "max_image_tokens", "pad_to_square")}).save_pretrained(folder)  # fmt: skip
    values = {
        "model": {"vora": str(folder)},
        "lora": {"rank": 8},
        "teacher": {"name": str(SHARED / "teacher"), "pairing": "hidden_states", "center": False},
        "data": {"sources": [{"path": "none"}]},
    }
    objective, processor = build_objective(load_recipe(values))
    assert processor.image_processor.pad_to_square
    assert_same(objective.student.eval(), "pretrain")
    heads = load_file(SHARED / "pretrain" / "model.safetensors")
    assert torch.equal(objective.distillation.heads["-1"][1].weight, heads["aux_vision.aux_layer_0.1.weight"])
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert any("lora_A" in name for name in trained) and any("patch_embedding" in name for name in trained)
    with pytest.raises(ValueError, match="rank 8 in 4 blocks"):
        build_objective(load_recipe(values | {"lora": {"rank": 4}}))
    with pytest.raises(ValueError, match="teacher.pairing"):
        build_objective(load_recipe(values | {"teacher": {"name": str(SHARED / "teacher")}}))
    with pytest.raises(ValueError, match="merged model"):
        build_objective(load_recipe({**values, "stage": "finetune", "teacher": None}))
