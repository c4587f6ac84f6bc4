"""An adapter without its LLM: put over it again it is the merged model, and it is refused over another; the package's
own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from command import vora
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from tiny import GRID, PATCH, SHAPE, command_line, logits_of, prompt, tiny_tokenizer, train_a_little
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vora import VoraForConditionalGeneration
from vora.build.lora import attach_vision_lora, merge_vision_lora
from vora.checkpoint import load_adapter, load_model, merge_run, read_info, save_adapter
from vora.checkpoint.load import digest_of, load_processor
from vora.checkpoint.pretrained import committed_model
from vora.checkpoint.save import merge
from vora.model.processing_vora import VoraProcessor
from vora.train.recipe import Recipe
from vora.train.stages import build_processor

OWN_MODEL = Path(committed_model())
SIZES = {"patch_size": PATCH, "image_size": PATCH * GRID, "patch_merge": 2}


@pytest.fixture(scope="module")
def adapter(llm_folder, tmp_path_factory):
    """(folder of an adapter, the merged model it comes from, its processor)."""
    folder = tmp_path_factory.mktemp("made") / "adapter"
    torch.manual_seed(0)
    model = VoraForConditionalGeneration.from_llm(str(llm_folder), **SIZES)
    processor = VoraProcessor.from_llm(str(llm_folder), **SIZES)
    with_lora = attach_vision_lora(model, rank=4, num_blocks=2)
    train_a_little(with_lora)
    save_adapter(with_lora, processor, folder)
    info = json.loads((folder / "vora.json").read_text())
    assert info["base_llm"] is None  # a folder of this machine
    (folder / "vora.json").write_text(json.dumps(info | {"base_llm": str(llm_folder)}))  # as if it were a hub id
    return folder, merge_vision_lora(with_lora), processor


def test_over_its_llm_it_is_the_merged_model(adapter):
    folder, merged, processor = adapter
    names = {path.name for path in folder.iterdir()}
    assert read_info(folder).kind == "adapter" and not names & {"tokenizer.json", "model.safetensors"}, names
    again, its_processor = load_model(str(folder))
    image = merged.config.image_token_id
    inputs = prompt([7, (2, 4, 0), 9, 11])
    inputs |= {"input_ids": torch.tensor([[7, image, image, 9, 11]]), "attention_mask": torch.ones(1, 5).long()}
    torch.testing.assert_close(logits_of(again, **inputs), logits_of(merged, **inputs))
    assert again.generation_config.suppress_tokens == merged.generation_config.suppress_tokens
    assert its_processor.chat_template == processor.chat_template
    assert its_processor.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert its_processor.image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize("markers", [("<|image>", "<image|>"), ("<|image>", ""), ("", "<image|>")])
def test_texts_around_images_are_kept(adapter, llm_folder, tmp_path, markers):
    folder, _, plain = adapter
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    marked = VoraProcessor.from_llm(str(llm_folder), image_markers=markers, **SIZES)
    (tmp_path / "chat_template.jinja").write_text(marked.chat_template)  # as `save_adapter` does
    again = load_processor(tmp_path)
    assert again.image_markers == list(markers) and load_processor(folder).image_markers == ["", ""]
    assert again.text_tokenizer().chat_template == plain.text_tokenizer().chat_template

    model = {"vora": str(tmp_path), "image_markers": ["[", "]"]}
    recipe = Recipe.model_validate(
        {"stage": "finetune", "model": model, "data": {"sources": [{"path": "none.jsonl"}]}}
    )
    anew = VoraProcessor.from_llm(str(llm_folder), image_markers=("[", "]"), **SIZES)
    assert build_processor(recipe).chat_template == anew.chat_template


@torch.no_grad()
def test_unmerged_it_is_its_llm_on_text_and_the_merged_model_on_images(adapter, llm_folder, tmp_path):
    """Also by plain PEFT over the plain LLM, as the docs have it."""
    folder, merged, _ = adapter
    model, processor = load_model(str(folder), unmerged=True)
    llm, ids = AutoModelForCausalLM.from_pretrained(llm_folder), torch.arange(20, 40)[None]
    assert torch.equal(model(input_ids=ids).logits[..., : llm.config.vocab_size], llm(input_ids=ids).logits)
    content = [{"type": "image", "image": Image.new("RGB", (9, 17), "red")}, {"type": "text", "text": "what colour?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    torch.testing.assert_close(model(**inputs).logits, merged(**inputs).logits, atol=1e-3, rtol=0)
    over_llm = PeftModel.from_pretrained(llm, folder, key_mapping={r"model\.language_model\.": "model."})
    expected = logits_of(merged, input_ids=ids)[..., : llm.config.vocab_size]
    torch.testing.assert_close(logits_of(over_llm, input_ids=ids), expected, atol=1e-4, rtol=0)
    merged.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no vision LoRA: it is merged already"):
        load_model(str(tmp_path), unmerged=True)


def test_what_is_merged_over_an_llm_ends_turns_as_the_template_does(adapter, llm_folder, tmp_path):
    """Of a base LLM whose texts end otherwise, also in what is sent to other runtimes."""
    base, folder = shutil.copytree(llm_folder, tmp_path / "base"), bent(adapter[0], tmp_path / "adapter")
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    model, processor = merge_run(folder, llm=str(base))
    assert len(processor.end_ids) == 2
    assert model.generation_config.eos_token_id == model.to_llm().generation_config.eos_token_id == processor.end_ids
    assert load_model(str(folder))[0].generation_config.eos_token_id == 2  # its own LLM's


def test_a_generation_config_beside_an_adapter_is_its_models(adapter, tmp_path):
    folder, merged, processor = adapter
    folder = shutil.copytree(folder, tmp_path / "adapter")
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "suppress_tokens": [7]}))
    merge(folder, tmp_path / "merged")
    for model in (load_model(str(folder))[0], load_model(str(tmp_path / "merged"))[0]):
        found = model.generation_config
        assert found.repetition_penalty == 1.5 and set(found.suppress_tokens) == {7, merged.config.image_token_id}
        assert found.eos_token_id == processor.end_ids[0]


def test_an_adapter_on_the_hub_is_put_over_its_llm(adapter, tmp_path, monkeypatch):
    """Here out of the hub's cache, which has what a hub would give."""
    model = tmp_path / "models--me--adapter"
    shutil.copytree(adapter[0], model / "snapshots" / "0123")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert isinstance(load_model("me/adapter")[0], VoraForConditionalGeneration)
    with pytest.raises(ValueError, match="me/none: there is no .*me/none, and HF_HUB_OFFLINE is set"):
        load_model("me/none")


def test_merges_by_command_over_a_folder_that_it_does_not_name(adapter, llm_folder, tmp_path):
    merged, folder = adapter[1], bent(adapter[0], tmp_path / "nameless", base_llm=None)
    with pytest.raises(ValueError, match="was a folder and so is not named in it.* --llm LLM"):
        load_model(str(folder))
    result = vora("merge", folder, "--llm", llm_folder, "-o", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    again, _ = load_model(str(tmp_path / "out"))
    for name, parameter in merged.named_parameters():
        torch.testing.assert_close(again.get_parameter(name), parameter)


def bent(folder, out, **changes):
    shutil.copytree(folder, out)
    info, config = (json.loads((out / name).read_text()) for name in ("vora.json", "config.json"))
    info |= {name: changes.pop(name) for name in info.keys() & changes.keys()}
    config["text_config"] |= changes.pop("text_config", {})
    (out / "vora.json").write_text(json.dumps(info))
    (out / "config.json").write_text(json.dumps(config | changes))
    return out


@pytest.mark.parametrize(
    ("changes", "load", "wanted"),
    [
        ({"text_config": {"num_hidden_layers": 7}}, load_adapter, "num_hidden_layers 7, but .* has 3: it is another"),
        ({"base_llm": "/no-such-llm"}, load_adapter, "an adapter without its LLM, and that, .*llm, cannot be loaded"),
        ({"image_token_id": 9}, load_processor, "images at token 9, but"),
    ],
)
def test_another_llm_is_refused(adapter, tmp_path, changes, load, wanted):
    with pytest.raises(ValueError, match=wanted):
        load(bent(adapter[0], tmp_path / "bent", **changes))


def test_an_llm_of_other_weights_is_refused(adapter, llm_folder, tmp_path):
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    digest = digest_of(llm)
    assert digest == digest_of(llm.to(torch.bfloat16)) == digest_of(load_adapter(adapter[0]).get_base_model())
    llm.model.layers[2].self_attn.q_proj.weight.data += 0.1
    llm.save_pretrained(tmp_path / "tuned")
    AutoTokenizer.from_pretrained(llm_folder).save_pretrained(tmp_path / "tuned")
    with pytest.raises(ValueError, match="shape, but of other weights"):
        load_adapter(adapter[0], llm=str(tmp_path / "tuned"))
    assert digest_of(adapter[1]) != digest  # merged
    assert digest_of(llm.to(torch.float16)) is None  # some numbers are others there
    assert load_adapter(adapter[0], dtype=torch.float16).dtype == torch.float16


def test_numbers_beyond_the_precision_are_refused(llm_folder, tmp_path):
    model = VoraForConditionalGeneration.from_llm(str(llm_folder), dtype=torch.float16, **SIZES)
    with_lora = attach_vision_lora(model, rank=2)
    name, parameter = next((n, p) for n, p in with_lora.named_parameters() if "lora_B" in n)
    parameter.data = torch.full_like(parameter.data, 1e6, dtype=torch.float32)
    with pytest.raises(ValueError, match="not finite in torch.float16"):
        save_adapter(with_lora, VoraProcessor.from_llm(str(llm_folder)), tmp_path)


def test_a_random_row_for_the_image_token_tells_no_llms_apart():
    llm = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE | {"vocab_size": 129}))
    embeddings, digests = llm.get_input_embeddings().weight.data, []
    for image_token_id in (None, 128):
        llm.config.image_token_id = image_token_id
        digests.append(digest_of(llm))
        for row in (128, 126):  # every second row is looked at, the last one too
            embeddings[row].normal_()
            digests.append(digest_of(llm))
    assert len(set(digests[:3])) == 3 and digests[3] == digests[4] != digests[5]


def test_the_packages_own_is_small_and_over_a_named_llm():
    assert sum(file.stat().st_size for file in OWN_MODEL.parent.rglob("*.safetensors")) < 40e6
    names = {file.name for file in OWN_MODEL.iterdir()}
    assert read_info(OWN_MODEL).kind == "adapter" and "tokenizer.json" not in names
    assert not any(name.endswith(".py") for name in names)
    config = json.loads((OWN_MODEL / "config.json").read_text())
    assert config["text_config"]["_name_or_path"] == "smollm2-135m" and len(config["llm_digest"]) == 16
    with safe_open(OWN_MODEL / "adapter_model.safetensors", "pt") as file:
        assert {str(file.get_slice(name).get_dtype()) for name in file.keys()} == {"BF16"}
        assert any("patch_embedding" in name for name in file.keys())
    card = ModelCard((OWN_MODEL / "README.md").read_text())  # what it is and what it scores
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(card.data.to_dict()["vora"]["stages"]) == 9
    assert all(f"| {task}" in card.text for task in ("Tiny ImageNet", "Flickr8k", "DAQUAR"))


@pytest.mark.slow
def test_it_answers_where_no_model_is_named(tmp_path):
    """`vora chat IMAGE` without a model named; needs the LLM, from the cache or from the Python package index."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    ran = command_line("chat", tmp_path / "red.png", "-q", "What is this?", "--max-new-tokens", 8)
    assert ran.returncode == 0 and ran.stdout.strip(), ran.stderr
