"""LLaVA's way is transformers' LLaVA in the form of a VoRA student; the text-only baseline sees only text."""

import copy
import json

import pytest
import torch
from messages import coloured, write_questions
from rich.console import Console
from safetensors import safe_open
from tiny import GRID, IMAGE, PATCH, InFourBits, generate, image, logits_of, prompt, text, tiny_llm, train_a_little
from tiny_teachers import tiny_vit
from transformers import AutoModelForImageTextToText

from vora import Teacher, attach_vision_lora, merge_vision_lora
from vora.baselines.llava import VoraLlavaForConditionalGeneration
from vora.checkpoint import load_adapter, load_model, merge, merge_run
from vora.data.schema import Sample, without_images
from vora.distill.teacher import images_of_patches
from vora.serve.chat import Chat
from vora.serve.engine import Engine
from vora.train.from_recipe import open_sources, packed_sequences, training_arguments
from vora.train.plan.meta_model import meta_model
from vora.train.plan.plan import tokens_of_budget
from vora.train.recipe import load_recipe
from vora.train.run import train
from vora.train.stages import build_objective, build_processor, check_trainable, load_vit, trainable_counts

MEAN, STD = (0.4, 0.5, 0.6), (0.3, 0.25, 0.2)
QUIET = Console(quiet=True)
TOWERS = ("vit", "clip_vision_model", "siglip_vision_model")


def tiny_tower(kind="vit"):
    vit = tiny_vit(kind)
    for parameter in vit.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Teacher(vit, MEAN, STD)


def tiny_llava(kind="vit", family="llama", patch_merge=1):
    torch.manual_seed(1)
    return VoraLlavaForConditionalGeneration.from_llm(
        tiny_llm(family), encoder=tiny_tower(kind), patch_merge=patch_merge, image_token_id=IMAGE
    )


SEEING = prompt([*text(3), (GRID, GRID, 0), *text(4, 1)])


@pytest.mark.parametrize("kind", TOWERS)
@torch.no_grad()
def test_it_computes_what_llava_does(kind):
    """The last but one state of each patch, without CLS token, goes through the projector into a causal LLM."""
    model = tiny_llava(kind)
    embedding, ids = model.model.patch_embedding, SEEING["input_ids"]
    pixels = images_of_patches(SEEING["pixel_values"], [(GRID, GRID)], PATCH, MEAN, STD)[0][None]
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    states = embedding.encoder.vit((pixels - mean) / std, output_hidden_states=True).hidden_states[-2]
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = embedding.projector(states[0, -(GRID**2) :])
    own = logits_of(model, **SEEING)
    torch.testing.assert_close(own, logits_of(model.to_llm(), inputs_embeds=embeds), atol=1e-5, rtol=0)
    other = logits_of(model, **SEEING | {"pixel_values": image(GRID, GRID, 1)})
    assert (own - other).abs().max() > 0.05


def test_merged_patches_are_one_token_each():
    embedding, grid, pixels = tiny_llava(patch_merge=2).model.patch_embedding, torch.tensor([[1, 2, 4]]), image(2, 4)
    found = embedding(pixels, grid)
    assert found.shape == (2, embedding.config.text_config.hidden_size)
    images = images_of_patches(pixels, [(2, 4)], PATCH, MEAN, STD)
    features = embedding.encoder(images, [(2, 4)], [2])[2]  # of 4 blocks the last but one
    right = torch.cat([features[index] for index in (2, 3, 6, 7)])
    torch.testing.assert_close(found[1], embedding.projector(right))
    embedding.projector.linear_1 = InFourBits(embedding.projector.linear_1)  # whose integers are no kind for features
    assert torch.equal(embedding(pixels, grid), found)


@pytest.mark.parametrize("kind", TOWERS)
def test_a_saved_model_opens_by_itself_and_the_tower_is_in_no_adapter(kind, tmp_path):
    model = tiny_llava(kind)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py")) and "auto_map" not in (tmp_path / "config.json").read_text()
    before = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(before) is VoraLlavaForConditionalGeneration
    assert torch.equal(logits_of(before, **SEEING), logits_of(model, **SEEING))
    assert generate(before, SEEING).shape == (1, 6)
    peft_model = attach_vision_lora(model, rank=4).train()
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == len(trained) - 4 > 0
    assert sum("projector" in name for name in trained) == 4 and not any(".encoder." in name for name in trained)
    assert not peft_model.model.model.patch_embedding.encoder.training
    train_a_little(peft_model)
    peft_model.save_pretrained(tmp_path)
    size = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * size + 20_000
    expected = logits_of(peft_model.eval(), **SEEING)
    assert (expected - logits_of(before, **SEEING)).abs().max() > 1e-3
    assert torch.equal(logits_of(load_adapter(tmp_path), **SEEING), expected)
    merged = merge_vision_lora(peft_model)
    assert type(merged) is VoraLlavaForConditionalGeneration
    torch.testing.assert_close(logits_of(merged, **SEEING), expected, atol=1e-4, rtol=1e-4)
    assert {n: p.shape for n, p in merged.named_parameters()} == {n: p.shape for n, p in before.named_parameters()}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, llm_folder):
    """A recipe of LLaVA's way on coloured images; keyword arguments replace whole sections."""
    folder = tmp_path_factory.mktemp("given")
    tiny_tower().vit.save_pretrained(folder / "vit")
    (folder / "vit" / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    given = {
        "model": {"llm": llm_folder, "encoder": str(folder / "vit"), "patch_merge": 2},
        "lora": {"rank": 4, "num_blocks": 2},
        "data": {"sources": [{"path": str(write_questions(folder / "train.jsonl"))}], "sequence_length": 128},
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "use_cpu": True},
    }
    return lambda **sections: load_recipe({**copy.deepcopy(given), **sections})


def answer(folder, image=None):
    chat = Chat(Engine(*load_model(str(folder))), max_new_tokens=8)
    return "".join(chat.ask("what?", [] if image is None else [image])).strip()


def test_two_stages_of_llavas_way(recipe, tmp_path):
    training = recipe().training | {"max_steps": 30, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
    first = recipe(training=training, lora={"rank": 8})
    assert first.model.image_attention == "causal"
    trainer = train(first, tmp_path / "one", console=QUIET)
    counts = trainable_counts(trainer.model)
    assert counts.pop("encoder")[0] == counts.pop("LLM")[0] == counts.pop("frozen copy of the projector")[0] == 0
    assert set(counts) == {"vision LoRA", "projector"} and all(some == whole for some, whole in counts.values())
    with safe_open(tmp_path / "one" / "final" / "adapter_model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "encoder" in name]
    assert "LoRA and a projector, which do not run by them" in (tmp_path / "one" / "final" / "README.md").read_text()
    merge(tmp_path / "one", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    for name in ("red", "blue"):
        assert answer(tmp_path / "merged", coloured(name, (16, 16))) == name
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "LLaVA's way" in card and "* Encoder: `vit`" in card and "without a vision encoder" not in card
    second = recipe(stage="finetune", model={"vora": str(tmp_path / "merged")})
    trainer = train(second, tmp_path / "two", console=QUIET)
    counts = trainable_counts(trainer.model)
    assert counts.pop("encoder")[0] == 0 and all(some == whole for some, whole in counts.values())
    trained, _ = merge_run(tmp_path / "two")
    changed = {name for name, p in trained.named_parameters() if not torch.equal(p, merged.get_parameter(name))}
    assert {name for name, _ in trained.named_parameters() if ".encoder." not in name} == changed
    assert "* Encoder: `vit`" in (tmp_path / "two" / "final" / "README.md").read_text()
    trainer.model.vora.model.patch_embedding.encoder.vit.requires_grad_(True)
    with pytest.raises(ValueError, match="none of the encoder"):
        check_trainable(trainer.model, "finetune")


def first_batch(recipe, processor):
    rows = packed_sequences(recipe, open_sources(recipe.data), processor, training_arguments(recipe, "."))
    return rows, rows.collate([next(iter(rows))])


def test_it_sees_the_samples_that_a_vora_student_sees(recipe):
    ours = recipe()
    vora = recipe(model={"llm": ours.model.llm, "patch_merge": 2}, teacher={"name": ours.model.encoder})
    own, other = (first_batch(one, build_processor(one, load_vit(one)))[1] for one in (ours, vora))
    assert own.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in own.items())


def test_a_recipe_has_one_way_to_see(recipe):
    for sections, wanted in (
        ({}, "plan the recipe's VoRA twin"),
        ({"teacher": {"name": "vit"}}, "teacher and model.encoder exclude each other"),
        ({"data": {"sources": [{"path": "x"}], "text_only": True}}, "model.encoder and data.text_only exclude"),
        ({"model": {"vora": "x", "encoder": "vit"}}, "model.vora has vision: leave"),
        ({"model": {"llm": "x", "encoder": "vit", "image_attention": "bidirectional"}}, "leave image_attention out"),
        ({"model": {"llm": "x", "encoder": "vit", "axial_positions": True}}, "leave axial_positions out"),
    ):
        with pytest.raises(ValueError, match=wanted):
            meta_model(recipe(**sections))


def test_a_text_only_baseline_learns_from_text_alone(recipe, tmp_path):
    data = recipe().data.model_dump() | {"text_only": True}
    text_only = recipe(data=data, model={"llm": recipe().model.llm})
    objective, processor = build_objective(text_only)
    rows, batch = first_batch(text_only, processor)
    assert "pixel_values" not in batch and not (batch["input_ids"] == processor.image_token_id).any()
    out = objective(**batch)
    assert set(out) == {"loss", "lm_loss"} and out["loss"].isfinite()
    out["loss"].backward()
    assert all(p.grad is None for p in objective.vora.model.patch_embedding.parameters())
    train(text_only, tmp_path / "run", console=QUIET)
    assert (tmp_path / "run" / "log.jsonl").read_text().count('"lm_loss"') == 2
    merge(tmp_path / "run", tmp_path / "merged")
    answer(tmp_path / "merged")  # asked without an image
    found = tokens_of_budget(text_only, objective.config, 30, 10, [])
    assert found["num_images"] == 0 and found["per_sample"] == 30
    with pytest.raises(ValueError, match="text_only was True and is None"):
        first_batch(recipe(), processor)[0].load_state_dict(json.loads(json.dumps(rows.state_dict())))


def test_a_sample_without_images_keeps_its_text():
    image = {"type": "image"}
    content = [image, {"type": "text", "text": "one or "}, image, {"type": "text", "text": "two?"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "two"}]
    record = without_images(Sample("r", ["a.png", "b.png"], [turns, [{"role": "text", "content": "hello"}]]))
    assert record.images == [] and record.open_images() == []
    assert record.conversations[0] == [{"role": "user", "content": "one or two?"}, turns[1]]
    assert record.messages([], record.conversations[0]) == record.conversations[0]
