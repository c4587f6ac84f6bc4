"""Every saved model has a card that says where it comes from, gives no folder of this machine away, and is true."""

import json
import re
import shlex
import shutil
from importlib.resources import as_file, files
from pathlib import Path

import pytest
import yaml
from command import vora
from huggingface_hub import ModelCard

from vora.build.base_llm import ALIASES
from vora.checkpoint.card import CardFacts, write_card, write_run_card
from vora.checkpoint.lineage import KNOWN_LICENCES, NOT_STATED, lineage, read_card
from vora.checkpoint.names import published
from vora.quickstart.run import card_rows
from vora.train.recipe import load_recipe, save_recipe


def test_each_saved_model_has_a_card_that_names_no_folder(work):
    for saved in ("one/final", "merged", "llm", "adapter", "second/final", "two/final", "merged-two"):
        text = (work / saved / "README.md").read_text()
        assert str(work) not in text and str(Path.home()) not in text and "/tmp/" not in text
        front = ModelCard(text).data.to_dict()
        assert "base_model" not in front and "datasets" not in front  # all of it is local
        assert front["license"] == "other" and front["license_name"] == "tiny-terms"
        assert front["library_name"] == "transformers" and "vora" in front["tags"]
        assert front["pipeline_tag"] == ("text-generation" if saved == "llm" else "image-text-to-text")
        assert "Base LLM: `tiny-llama`" in text and "Teacher: `vit`" in text
        assert "| base LLM | `tiny-llama` | other (tiny-terms) |" in text and "| teacher | `vit` | mit |" in text
        assert f"| data | `first.jsonl` | {NOT_STATED} |" in text
        assert ("language part alone" in text) == (saved == "llm")


def test_the_card_of_a_merged_model_tells_how_it_was_made(work):
    text = (work / "merged" / "README.md").read_text()
    last = json.loads((work / "one" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3  # though a line is written every two
    assert "| steps | 3 |" in text and f"| samples seen | {last['samples_seen']:,} |" in text
    assert f"lm_loss {last['lm_loss']:.4g}, distill_loss {last['distill_loss']:.4g} |" in text
    assert "`first.jsonl` (weight 2), `sec*.jsonl` (weight 1)" in text
    assert "## Evaluation\n\nnot evaluated" in text and "started as the teacher's" in text
    recipe = read_card(work / "merged")["stages"][0]["recipe"]
    saved = yaml.safe_load((work / "one" / "recipe.yaml").read_text())
    assert recipe["model"]["llm"] == "tiny-llama" and recipe["teacher"]["name"] == "vit"
    assert recipe["data"]["sources"][1]["image_folder"] == work.name
    assert recipe["sample_generations"][0]["image"] == "red.png"
    for section, key in [("data", "caption_prompts"), ("training", "max_steps"), ("lora", "rank")]:
        assert recipe[section][key] == saved[section][key]
    load_recipe(recipe)


def test_stage_two_keeps_its_ancestor(work, tmp_path):
    shutil.copytree(work / "merged-two", tmp_path / "moved")  # alone: its ancestors may be elsewhere
    record = read_card(tmp_path / "moved")
    assert (record["base_llm"], record["teacher"]) == ("tiny-llama", "vit")
    first, second = record["stages"]
    told = [(stage["stage"], stage["steps"], stage["made"], stage["recipe"]["stage"]) for stage in (first, second)]
    assert told == [("pretrain", 3, "merged", "pretrain"), ("finetune", 2, "trained", "finetune")]
    assert second["source"] == "merged" and second["data"] == [{"name": "second.jsonl", "weight": None}]
    text = (tmp_path / "moved" / "README.md").read_text()
    assert "| steps | 3 | 2 |" in text and text.count("yaml\n") == 2


def test_models_load_and_merge_as_their_cards_say(work, monkeypatch, tmp_path):
    monkeypatch.chdir(work)
    shutil.copy(work / "red.png", work / "image.png")
    for folder, family in (("merged", "vora"), ("llm", "llama")):
        text, found = (work / folder / "README.md").read_text(), {}
        code = re.search(r"```python\n(.*?)```", text, flags=re.S).group(1)
        exec(code.replace("THIS_FOLDER", str(work / folder)), found)
        assert found["model"].config.model_type == family and isinstance(found.get("answer", ""), str)
    command = re.search(r"`vora (chat .*?)`", (work / "merged" / "README.md").read_text()).group(1)
    words = shlex.split(command.replace("THIS_FOLDER", str(work / "merged")))
    assert vora(*words, "--max-new-tokens", 4).returncode == 0
    text = (work / "one" / "final" / "README.md").read_text()
    assert "over it by itself" in text and "from_pretrained" not in text
    command = re.search(r"^vora (merge .*)$", text, flags=re.M).group(1)
    vora(*command.replace("RUN", str(work / "one")).replace("my-vora", f"{tmp_path}/my-vora").split())
    assert (tmp_path / "my-vora" / "model.safetensors").exists()


def test_a_card_knows_how_far_weights_and_log_reach(work, saved):
    run = shutil.copytree(work / "one", saved / "run")
    log = run / "log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines()[:-1]))
    text = write_run_card(saved, run).read_text()
    assert "| steps | 3 |" in text and "(by step 2)" in text
    for folder in ("checkpoint-3", "final"):
        shutil.rmtree(run / folder)
    (run / "checkpoint-2" / "README.md").unlink()
    text = write_run_card(saved, run).read_text()
    assert "| steps | 2 |" in text and "(by step" not in text


def test_a_chain_of_runs_without_cards_still_names_its_llm(work, saved):
    first = shutil.copytree(work / "one", saved / "first")
    (first / "final" / "README.md").unlink()  # as of a run that was killed
    second = shutil.copytree(first, saved / "second")
    recipe = yaml.safe_load((second / "recipe.yaml").read_text())
    recipe["model"] |= {"llm": None, "vora": str(first)}
    (second / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write_run_card(saved, second)
    assert read_card(saved)["base_llm"] == "tiny-llama"


FACTS = CardFacts(
    "imported",
    "pretrain",
    "Qwen/Qwen2.5-7B-Instruct",
    source="/somewhere/else/VoRA-7B",
    teacher="apple/aimv2-huge-patch14-448",
    data=[("Hon-Wong/VoRA-Recap-29M", None), ("captions/more.jsonl", None)],
    merge_command="vora import-reference CHECKPOINT --llm LLM -o my-vora --merge",
)


@pytest.fixture
def saved(tmp_path):
    """A folder that looks like a saved model."""
    (tmp_path / "config.json").write_text('{"model_type": "vora"}')
    return tmp_path


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A card asks nothing of it: none would be written then."""
    monkeypatch.setattr("socket.socket.connect", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


def front_of(folder, facts):
    return ModelCard(write_card(folder, facts).read_text()).data.to_dict()


def test_hub_ids_go_into_the_front_matter_with_the_licences_that_are_known(saved):
    front = front_of(saved, FACTS)
    assert front["base_model"] == "Qwen/Qwen2.5-7B-Instruct" and front["license"] == "apache-2.0"
    assert front["datasets"] == ["Hon-Wong/VoRA-Recap-29M"]
    assert front["vora"]["licences"]["more.jsonl"] == front["vora"]["licences"][FACTS.teacher] == NOT_STATED
    text = (saved / "README.md").read_text()
    assert "imported, from `VoRA-7B`" in text and "/somewhere" not in text and "captions/" not in text
    for row in ("steps", "samples seen", "last losses"):
        assert f"| {row} | not stated |" in text
    assert "### Recipe 1: pretrain\n\nnot stated" in text
    front = front_of(saved, CardFacts(made="imported", stage="pretrain", base_llm="some/llm"))
    assert front["license"] == "other" and front["base_model"] == "some/llm"
    front = front_of(saved, CardFacts("merged", "pretrain", "smollm2-135m", data=[("easy-vqa", None)], recipe={}))
    assert (front["base_model"], front["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    assert front["vora"]["licences"]["easy-vqa"] == "mit" and front["vora"]["teacher"] == "none"
    assert all(published(alias) in KNOWN_LICENCES for alias in ALIASES)


def test_a_page_that_was_fetched_before_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--some--llm"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0123")
    (model / "snapshots" / "0123").mkdir(parents=True)
    page = "---\nlicense: other\nlicense_name: its-own\n---\n# An LLM\n"
    (model / "snapshots" / "0123" / "README.md").write_text(page)
    facts = CardFacts(made="trained", stage="pretrain", base_llm="some/llm", teacher="some/vit")
    assert lineage(facts)["licences"] == {"some/llm": "other (its-own)", "some/vit": NOT_STATED}


def test_unmerged_imports_say_how_to_merge(saved):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "layers_to_transform": [0], "layers_pattern": "layers"}
    config |= {"target_modules": ["q_proj"], "modules_to_save": ["patch_embedding"]}
    (saved / "adapter_config.json").write_text(json.dumps(config))
    (saved / "model.safetensors").touch()
    text = write_card(saved, FACTS).read_text()
    assert FACTS.merge_command in text and "RUN" not in text
    # from_pretrained opens such a folder, whose files are the whole model and the adapter
    assert "do not run by themselves" not in text and "AutoModelForImageTextToText.from_pretrained" in text
    assert "model code" in text


def test_the_quickstarts_card_has_licences_and_figures_with_their_commands(saved):
    (saved / "run" / "final").mkdir(parents=True)
    with as_file(files("vora.quickstart")) as folder:
        save_recipe(load_recipe(folder / "recipe.yaml"), saved / "run" / "recipe.yaml")
    rows = [("VQAv2", "accuracy", 0.51234, 5000, "vora eval --model=/home/me/runs/x -d ~/data/vqa | tee log")]
    figures = {"accuracy": 0.975, "text_only_accuracy": 0.67, "num_test_questions": 9673}
    rows += card_rows(figures, "vora quickstart --llm /home/me/llm --minutes 13 --seed 0")
    text = write_run_card(saved, saved / "run", evaluation=rows).read_text()
    front = ModelCard(text).data.to_dict()
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and front["license"] == "apache-2.0"
    assert front["vora"]["licences"] == {front["base_model"]: "apache-2.0", "teacher": "apache-2.0", "easy-vqa": "mit"}
    assert "| VQAv2 | accuracy | 0.5123 | 5,000 | `vora eval --model=x -d vqa \\| tee log` |" in text
    assert "| 0.975 | 9,673 | `vora quickstart --llm llm --minutes 13 --seed 0` |" in text and "| 0.67 |" in text
    assert "not evaluated" not in text and "/home" not in text


def test_saving_never_fails_for_the_card(tmp_path, caplog):
    assert write_card(tmp_path / "no-such-folder", FACTS) is None
    (tmp_path / "recipe.yaml").write_text("model: 3")
    assert write_run_card(tmp_path, tmp_path) is None
    assert caplog.text.count("without a card") == 2


def test_what_a_name_becomes_in_public(tmp_path, monkeypatch):
    (tmp_path / "here" / "llm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paths = "/home/me/models/llm ~/models/llm/ ../models/llm here/llm C:\\models\\llm file:///home/me/llm".split()
    assert {published(path) for path in paths} == {"llm"}
    assert published("Qwen/Qwen3-1.7B") == "Qwen/Qwen3-1.7B"
