"""The example that lets captions learn by their success: what it draws, what it rewards, and what it changes."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from vora.data.sources import load_source
from vora.eval.answers import told_answers
from vora.eval.prompting import free_answers, prompt_of_messages
from vora.serve.chat import load_model
from vora.train.recipe import load_recipe
from vora.train.run import train

SCRIPT = Path(__file__).parents[1] / "examples" / "self_critical.py"
SIZES = {"red": (16, 16), "blue": (8, 24), "green": (24, 16)}


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("self_critical", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A file of three pictures with two captions each."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for name, size in SIZES.items():
        Image.new("RGB", size, name).save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "captions": [f"the {name} one is {name}", f"it is {name}"]})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "captions.jsonl"


@pytest.fixture
def seeing(example, model_folder, captioned):
    """A critic that captions all three pictures, and the model that is to do it."""
    options = SimpleNamespace(captions_each=4, temperature=1e-4, most_tokens=6, pictures=3)
    source = load_source(str(captioned))
    critic = example.Critic(source, SimpleNamespace(seed=0, process_index=0, world_size=1), options)
    model, processor = load_model(str(model_folder))
    return critic, model.float(), processor, [(number, source[number]) for number in range(3)]


def likely(model, processor, pictures, told, temperature=1.0):
    """Log-probability of each of the captions: float[N, K]."""
    head = torch.nn.Linear.forward
    records = []
    for (number, record), texts in zip(pictures, told):
        asked = record.conversations[0][:-1]
        records.append(replace(record, conversations=[[*asked, {"role": "assistant", "content": t}] for t in texts]))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.lm_head, "forward", lambda x: head(model.lm_head, x) / temperature)
        for batch in told_answers(model, processor, records):
            found |= batch
    return np.array([found[number].log_probs for number in range(len(records))])


def test_cold_captions_are_the_greedy_ones(example, seeing):
    critic, model, processor, pictures = seeing
    captions, ended = critic.captions_of(model, processor, pictures, Accelerator(cpu=True))
    prompts = [prompt_of_messages(processor, example.question_of(record)) for _, record in pictures]
    greedy = free_answers(model, processor, prompts, 6)
    assert captions == [[text] * 4 for text in greedy] and len(set(greedy)) > 1
    assert ended.shape == (3, 4) and not ended.any()


def test_a_caption_ends_where_the_model_ends_it(example, seeing, monkeypatch):
    """Each row at its own time; what comes after is not heard."""
    critic, model, processor, pictures = seeing
    end = processor.tokenizer.eos_token_id
    drawn = iter([[65, 66, end], [65, end, 67], [end, 66, 67]])

    def logits(states):
        return 100.0 * torch.nn.functional.one_hot(torch.tensor(next(drawn)).repeat_interleave(4), 400)

    monkeypatch.setattr(model, "logits", logits)
    captions, ended = critic.captions_of(model, processor, pictures, Accelerator(cpu=True))
    expected = [processor.tokenizer.decode(ids) for ids in ([65, 65], [66], [])]
    assert captions == [[text] * 4 for text in expected] and ended.all()
    assert next(drawn, None) is None


def test_rewards_know_the_picture_and_the_end(seeing):
    critic, *_, pictures = seeing
    told = [["it is red", "it is blue"]] * 3
    rewards = critic.rewards(pictures, told, np.array([[True, True], [False, True], [True, True]]))
    assert rewards[0, 0] > 1 > rewards[0, 1] and rewards[1, 1] > 1 > rewards[1, 0] and (rewards[2] < 1).all()
    broken = critic.rewards(pictures, told, np.zeros((3, 2), bool))
    assert broken[0, 0] < rewards[0, 0] and broken[1, 1] < rewards[1, 1]


def test_gains_are_above_the_mean_of_the_others(example):
    gains = example.over_the_others(np.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]))
    assert gains.tolist() == [[3.0, -1.5, -1.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_what_gains_becomes_likelier(example, seeing, temperature):
    critic, model, processor, pictures = seeing
    told = [["it is red", "it is blue"], ["is one", "one is"], ["green", "which"]]
    gains = np.array([[1.0, -1.0], [0.0, 0.0], [-0.5, 0.5]])
    batch, each = example.said_again(processor, pictures, told, np.ones((3, 2), bool), gains)
    assert len(each) == int((batch["targets"] != -100).sum())
    before = likely(model, processor, pictures, told, temperature)
    loss = example.policy_loss(model.requires_grad_(True), batch, each, temperature, torch.device("cpu"))
    assert float(loss.detach()) == pytest.approx(-(gains * before).sum() / gains.size, rel=1e-4)
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.02 * parameter.grad
    after = likely(model, processor, pictures, told, temperature) - before
    assert after[0, 0] > after[0, 1] and after[2, 1] > after[2, 0]


def test_what_was_not_drawn_gains_nothing(example, seeing):
    _, _, processor, pictures = seeing
    for texts, whole in ((["red", "blue"], [True, False]), (["red", ""], [True, True])):
        batch, each = example.said_again(processor, pictures[:1], [texts], np.array([whole]), np.array([[1.0, 1.0]]))
        wanted = batch["targets"][batch["targets"] != -100]
        nothing = wanted[each == 0].tolist()
        assert nothing[-1] == processor.tokenizer.eos_token_id and nothing.count(nothing[-1]) == 1
        assert len(nothing) == 1 if all(texts) else len(nothing) == 2  # "." and its end


def test_bad_rows_are_left_out(example, captioned, tmp_path):
    rows = captioned.read_text() + json.dumps({"image": "none.png", "captions": ["it is none"]}) + "\n"
    (captioned.parent / "with_bad.jsonl").write_text(rows + json.dumps({"captions": [], "image": "red.png"}) + "\n")
    options = SimpleNamespace(captions_each=2, temperature=1.0, most_tokens=6, pictures=3)
    arguments = SimpleNamespace(seed=0, process_index=0, world_size=1)
    critic = example.Critic(load_source(str(captioned.parent / "with_bad.jsonl")), arguments, options)
    drawn = [number for _ in range(4) for number, _ in critic.pictures()]
    assert sorted(drawn) == [0] * 4 + [1] * 4 + [2] * 4 and critic.num_bad > 1


def test_two_processes_change_the_upper_blocks_alone(llm_folder, teacher_folder, captioned, tmp_path):
    texts = tmp_path / "text.jsonl"
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in ("which colour is it", "what is which")))
    recipe = load_recipe(
        {
            "model": {"llm": llm_folder},
            "teacher": {"name": teacher_folder, "image_only_steps": 1},
            "lora": {"rank": 4, "num_blocks": 3, "keep_text": 1.0, "spare_text": 0.1},
            "data": {"sources": [{"path": str(captioned)}, {"path": str(texts)}], "row_tokens": 160},
            "training": {"max_steps": 3, "learning_rate": 1e-2, "use_cpu": True, "warmup_steps": 1},
        }
    )
    train(recipe, tmp_path / "run")
    options = f"--captions {captioned} --steps 3 --pictures 1 --captions-each 3 --first-block 1".split()
    script = [SCRIPT, tmp_path / "run", tmp_path / "run" / "recipe.yaml", *options, "--out", tmp_path / "out"]
    both = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0".split()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, *both, *script], env=environment, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3] and all(line["text_energy"] > 0 for line in lines)
    assert "words by their success" in (tmp_path / "out" / "README.md").read_text()
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("run/final", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name].to(before[name].dtype))}
    assert changed and all(".layers.1." in name or ".layers.2." in name for name in changed)
    for changes, cause in (([], "not empty"), (["--captions-each", "1"], "below 2"), (["--out", tmp_path / "x"], "")):
        again = subprocess.run([sys.executable, *script, *changes, "--pictures", "9"], capture_output=True, text=True)
        assert again.returncode != 0 and (cause or "3 pictures are too few for 9") in again.stderr
