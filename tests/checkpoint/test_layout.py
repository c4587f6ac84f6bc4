"""What a folder says of itself: the same from its description as from the files of one that was saved without."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from tiny import tiny_llm, tiny_vora
from transformers import GenerationConfig

from vora import VoraForConditionalGeneration
from vora.build.lora import merge_vision_lora
from vora.checkpoint import AdapterInfo, load_adapter, load_model, read_info, save, save_merged
from vora.checkpoint.load import digest_of, distillation_of
from vora.checkpoint.manifest import MANIFEST
from vora.checkpoint.save import merge
from vora.distill.blockwise import SUMMARY

LAYERS = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
KINDS = dict.fromkeys(("one/final", "one/checkpoint-2", "second/final", "adapter"), "adapter")
KINDS |= {"merged": "merged", "llm": "llm"}


@pytest.mark.parametrize("folder", KINDS)
def test_all_that_is_saved_is_described_and_names_no_folder(work, folder, tmp_path):
    for file in ("vora.json", "config.json", "adapter_config.json"):
        if (work / folder / file).exists():
            assert str(work) not in (work / folder / file).read_text()
    info = read_info(shutil.copytree(work / folder, tmp_path / "it"))  # apart from its run
    has_lora, is_run = KINDS[folder] == "adapter", "final" in folder or "checkpoint" in folder
    assert info.kind == KINDS[folder] and info.stage == "pretrain" and info.dtype == "bfloat16"
    assert info.base_llm is None and info.teacher == "vit"  # both were folders
    assert info.block_pairs == ((0, 0), (1, 1), (1, SUMMARY))
    assert info.has_heads == is_run and info.has_processor == (is_run or folder == "merged")
    assert info.adapter == (AdapterInfo(2, 2, LAYERS) if has_lora else None)
    assert (info.llm_digest is not None) == has_lora
    assert info.model_type == ("llama" if folder == "llm" else "vora")
    assert info.max_images == 1
    # one that was saved without a description says the same, but for what is in no other file: a digest was in
    # config.json then, and pairs follow from heads alone
    (tmp_path / "it" / "vora.json").unlink()
    without = {} if info.has_heads else {"block_pairs": ()}
    assert read_info(tmp_path / "it") == replace(info, llm_digest=None, max_images=None, **without)


def test_a_run_is_what_it_saved_last_and_names_its_folders(work, tmp_path):
    info = read_info(work / "one")
    assert info.path == work / "one" / "final" and info.run == work / "one" and info.source is None
    assert (info.base_llm, info.teacher) == (str(work / "tiny-llama"), str(work / "vit"))
    assert read_info(work / "one" / "checkpoint-2").base_llm == info.base_llm
    assert read_info(work / "second").source == str(work / "one")
    shutil.copytree(work / "one", tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "final")
    assert read_info(tmp_path / "one").path.name == "checkpoint-3"
    shutil.copytree(work / "one" / "final", tmp_path / "one" / "final")
    (tmp_path / "one" / "final" / MANIFEST).unlink()  # written last: the run was killed before
    assert read_info(tmp_path / "one").path.name == "checkpoint-3"
    shutil.rmtree(tmp_path / "one" / "final")
    for checkpoint in (tmp_path / "one").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(ValueError, match="has not saved anything yet"):
        read_info(tmp_path / "one")


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ValueError, match="no config.json and no recipe.yaml"):
        read_info(tmp_path)
    for name in (tmp_path / "none", "no/such/model"):
        with pytest.raises(ValueError, match="there is no .* never looked for on the hub"):
            read_info(name)
    tiny_llm("llama").save_pretrained(tmp_path)
    assert read_info(tmp_path).kind == "llm"
    with pytest.raises(ValueError, match="is a llama model without vision"):
        load_model(tmp_path)
    (tmp_path / "vora.json").write_text('{"kind": ')
    with pytest.raises(ValueError, match="vora.json is no description of a model .* delete it"):
        read_info(tmp_path)


def test_a_generation_config_beside_what_a_run_saved_goes_wherever_it_is_merged_to(work, tmp_path):
    run = shutil.copytree(work / "one", tmp_path / "one")
    (run / "final" / "generation_config.json").write_text('{"repetition_penalty": 1.5}')
    merge(run, tmp_path / "merged", llm_out=tmp_path / "llm", adapter_out=tmp_path / "adapter")
    for folder in ("merged", "llm", "adapter"):
        saved = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert saved["repetition_penalty"] == 1.5


def test_a_run_is_loaded_as_its_merged_model(work):
    expected, processor = load_model(work / "merged")
    for path in (work / "one", work / "one" / "final", str(work / "one")):
        model, its_processor = load_model(path, max_image_tokens=1)
        assert model.dtype == torch.bfloat16 and its_processor.image_processor.max_image_tokens == 1
        assert all(torch.equal(p, model.get_parameter(name)) for name, p in expected.named_parameters())
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
        assert its_processor.chat_template == processor.chat_template
    assert load_model(work / "merged", dtype="float32")[0].dtype == torch.float32
    for path in (work / "one", work / "merged"):
        with pytest.raises(ValueError, match="has its own LLM"):
            load_model(path, llm=str(work / "tiny-llama"))


def test_an_adapter_and_its_heads_go_on_where_they_were(work):
    """In float32, though the LLM is in bf16; of a run that went on from another over the first one's LLM."""
    for run in ("one", "second"):
        model, saved = load_adapter(work / run), load_file(work / run / "final" / "adapter_model.safetensors")
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = {re.sub(r"\.modules_to_save|\.default", "", name): tensor for name, tensor in trained.items()}
        assert found.keys() == saved.keys() and all(torch.equal(found[name], saved[name]) for name in saved)
        assert digest_of(model.get_base_model()) == read_info(work / run).llm_digest
    heads, saved = distillation_of(work / "one"), load_file(work / "one" / "final" / "distillation.safetensors")
    assert heads.pairs == [(0, 0), (1, 1), (1, SUMMARY)] and heads.standardize
    assert heads.state_dict().keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in heads.state_dict().items())
    assert distillation_of(work / "merged") is None


def test_an_adapter_alone_comes_in_the_run_s_precision_and_with_its_card(work, tmp_path):
    tensors = load_file(work / "adapter" / "adapter_model.safetensors")
    assert tensors and {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert "vora merge THIS_FOLDER --llm LLM -o my-vora" in (work / "adapter" / "README.md").read_text()
    assert merge_vision_lora(load_adapter(work / "adapter", llm=str(work / "tiny-llama"))).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no run of vora train"):
        merge(work / "adapter", tmp_path / "x", adapter_out=tmp_path / "y")
    with pytest.raises(ValueError, match="is merged already: use it as it is"):
        merge(work / "merged", tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("failing", ["save_pretrained", "to_llm"])
def test_a_merge_that_fails_leaves_nothing(work, tmp_path, monkeypatch, failing):
    def fail(model, folder=None, **kwargs):
        if folder is not None:
            (Path(folder) / "config.json").write_text("{}")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(save if failing == "to_llm" else VoraForConditionalGeneration, failing, fail)
        with pytest.raises(OSError, match="No space"):
            merge(work / "one", tmp_path / "out", llm_out=tmp_path / "llm")
    assert not list(tmp_path.iterdir())
    merge(work / "one", tmp_path / "out", llm_out=tmp_path / "llm")  # the retry
    assert {path.name for path in tmp_path.iterdir()} == {"out", "llm"}


def test_what_is_pushed_is_what_is_saved(tmp_path, monkeypatch):
    pushed = []

    def upload(self, working_dir, *given, **options):
        pushed.append(Path(working_dir, "generation_config.json").read_text())

    monkeypatch.setattr(transformers.modeling_utils.PreTrainedModel, "_upload_modified_files", upload)
    made = SimpleNamespace(create_repo=lambda *given, **options: SimpleNamespace(repo_id="me/x"))
    if hasattr(transformers.modeling_utils, "hf_api"):
        monkeypatch.setattr(transformers.modeling_utils, "hf_api", lambda *given, **options: made)
    else:  # before
        monkeypatch.setattr(transformers.modeling_utils, "create_repo", made.create_repo)
    model = tiny_vora(tiny_llm("llama"))
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(tmp_path / "own", push_to_hub=True, repo_id="me/x")
    saved = (tmp_path / "own" / "generation_config.json").read_text()
    assert pushed == [saved] and json.loads(saved)["repetition_penalty"] == 1.1


def test_a_temperature_without_sampling_is_saved_as_it_came(tmp_path):
    """As of Vicuna, whose generation config transformers would not save after a change."""
    llm = tiny_llm("llama")
    llm.generation_config.temperature, llm.generation_config.top_p = 0.9, 0.6
    model = tiny_vora(llm)
    model.save_pretrained(tmp_path / "own")
    info = replace(read_info(tmp_path / "own"), base_llm="some/vicuna")
    save_merged(model, None, tmp_path / "merged", info)
    folders = ["own", "merged"]
    if Version(transformers.__version__) >= Version("5.23"):  # earlier ones save no LLM with such values
        model.to_llm().save_pretrained(tmp_path / "llm")
        folders.append("llm")
    for folder in folders:
        values = json.loads((tmp_path / folder / "generation_config.json").read_text())
        assert (values["temperature"], values["top_p"]) == (0.9, 0.6) and "do_sample" not in values
        assert ("suppress_tokens" in values) == (folder != "llm")
    again = VoraForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert again.generation_config.temperature == 0.9 and type(model.generation_config) is GenerationConfig
    assert read_info(tmp_path / "merged").base_llm == "some/vicuna"
