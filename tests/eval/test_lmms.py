"""lmms-eval runs our models by its own command, offline, on a small local task."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from tiny import GRID, PATCH

from vora import VoraForConditionalGeneration
from vora.checkpoint import load_model
from vora.eval.scoring.candidates import AnswerTree, answer_ids, candidate_scores
from vora.eval.scoring.generate import free_answers, prompt_of_messages
from vora.model.processing_vora import VoraProcessor

pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: pip install vora-vlm[lmms]")

COLOURS = ["red", "green", "blue", "yellow"]
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function utils.images
doc_to_text: "what colour is the shape?"
"""
GENERATED = """
doc_to_target: answer
generation_kwargs: {max_new_tokens: 5, temperature: 0, do_sample: false, until: ["\\n\\n"]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_target: !function utils.number
doc_to_choice: ["red", "green", "blue", "yellow"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
UTILS = """
COLOURS = ["red", "green", "blue", "yellow"]


def images(doc):
    return [doc["image"].convert("RGB")]


def number(doc):
    return COLOURS.index(doc["answer"])
"""


@pytest.fixture(scope="module")
def folder(llm_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    options = {"patch_size": PATCH, "image_size": PATCH * GRID}
    torch.manual_seed(3)
    model = VoraForConditionalGeneration.from_llm(llm_folder, **options)
    model.save_pretrained(folder / "model")
    VoraProcessor.from_llm(llm_folder, **options).save_pretrained(folder / "model")
    images = [Image.new("RGB", (12, 12), colour) for colour in COLOURS]
    rows = Dataset.from_dict({"image": images, "answer": COLOURS})
    rows.cast_column("image", ImageFeature()).to_parquet(folder / "colours.parquet")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "utils.py").write_text(UTILS)
    for name, kind, rest in (("colours", "generate_until", GENERATED), ("choices", "multiple_choice", CHOSEN)):
        task = TASK.format(name=name, kind=kind, data=folder / "colours.parquet") + rest
        (tasks / f"{name}.yaml").write_text(task)
    return folder


def evaluate(folder, task, *arguments):
    """What lmms-eval's command says: (metrics, its samples)."""
    out = folder / f"out-{task}-{len(arguments)}"
    command = [sys.executable, "-m", "lmms_eval", "--model", "vora", "--tasks", task, "--batch_size", "3"]
    command += ["--model_args", f"pretrained={folder / 'model'},device=cpu", "--include_path", str(folder / "tasks")]
    command += ["--log_samples", "--output_path", str(out), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    results = json.loads(next(out.rglob("*results.json")).read_text())
    samples = [json.loads(line) for line in next(out.rglob("*samples*.jsonl")).read_text().splitlines()]
    return results["results"][task], sorted(samples, key=lambda sample: sample["doc_id"])


def prompts_of(folder):
    model, processor = load_model(str(folder / "model"))
    prompts = []
    for colour in COLOURS:
        image = {"type": "image", "image": Image.new("RGB", (12, 12), colour)}
        content = [image, {"type": "text", "text": "what colour is the shape?"}]
        prompts.append(prompt_of_messages(processor, [{"role": "user", "content": content}]))
    return model, processor, prompts


@pytest.mark.parametrize("arguments", [(), ("--force_simple",)], ids=["messages", "simple"])
def test_generates_what_the_model_says(folder, arguments):
    _, samples = evaluate(folder, "colours", *arguments)
    model, processor, prompts = prompts_of(folder)
    expected = [free_answers(model, processor, [prompt], 5)[0].split("\n\n")[0].strip() for prompt in prompts]
    assert [sample["filtered_resps"] for sample in samples] == expected


def test_chooses_the_likeliest(folder):
    metrics, _ = evaluate(folder, "choices", "--force_simple")
    model, processor, prompts = prompts_of(folder)
    tree = AnswerTree(answer_ids(processor, prompts[0], COLOURS))
    scores = candidate_scores(model, processor, prompts, [tree] * 4, top=None)
    expected = sum(int(score.argmax()) == number for number, score in enumerate(scores)) / 4
    assert metrics["acc,none"] == pytest.approx(expected)


def test_what_is_no_image_is_refused(folder):
    from lmms_eval.api.instance import Instance

    from vora.eval.lmms import VoraForTasks

    with pytest.raises(ValueError, match="--model_args resolution are unknown"):
        VoraForTasks(str(folder / "model"), device="cpu", resolution=224)
    adapter = VoraForTasks(str(folder / "model"), device="cpu")
    adapter.task_dict = {"films": {"test": [{}]}}
    arguments = ("what?", {}, lambda document: ["film.mp4"], 0, "films", "test")
    metadata = {"task": "films", "doc_id": 0, "repeats": 1}
    with pytest.raises(ValueError, match="films, document 0, gives a str: images alone"):
        adapter.generate_until([Instance("generate_until", arguments, 0, metadata)])


def test_transparent_images_lie_on_white(folder):
    from lmms_eval.api.instance import Instance

    from vora.eval.lmms import VoraForTasks

    adapter = VoraForTasks(str(folder / "model"), device="cpu")
    adapter.task_dict = {"clear": {"test": [{}]}}
    pixels = []
    for image in (Image.new("RGBA", (12, 12), (0, 0, 0, 0)), Image.new("RGB", (12, 12), "white")):
        arguments = ("what?", {}, lambda document, image=image: [image], 0, "clear", "test")
        request = Instance("generate_until", arguments, 0, {"task": "clear", "doc_id": 0, "repeats": 1})
        pixels.append(prompt_of_messages(adapter.processor, adapter.messages(request)).inputs["pixel_values"])
    assert torch.equal(*pixels)
