"""lmms-eval runs our models by its own command, offline, on a small local task."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from vora.eval.scoring.candidates import answer_ids, candidate_scores
from vora.eval.scoring.generate import free_answers
from vora.eval.scoring.prompt import prompt_of_messages

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
def folder(seeing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lmms")
    for part in seeing[:2]:
        part.save_pretrained(folder / "model")
    images = [Image.new("RGB", (12, 12), colour) for colour in COLOURS]
    rows = Dataset.from_dict({"image": images, "answer": COLOURS})
    rows.cast_column("image", ImageFeature()).to_parquet(folder / "colours.parquet")
    (folder / "utils.py").write_text(UTILS)
    for name, kind, rest in (("colours", "generate_until", GENERATED), ("choices", "multiple_choice", CHOSEN)):
        task = TASK.format(name=name, kind=kind, data=folder / "colours.parquet") + rest
        (folder / f"{name}.yaml").write_text(task)
    return folder


@pytest.mark.parametrize(("tasks", "arguments"), [("colours", []), ("colours,choices", ["--force_simple"])])
def test_it_answers_as_the_model_does(folder, seeing, tmp_path, tasks, arguments):
    command = [sys.executable, "-m", "lmms_eval", "--model", "vora", "--tasks", tasks, "--batch_size", "3"]
    command += ["--model_args", f"pretrained={folder / 'model'},device=cpu", "--include_path", str(folder)]
    command += ["--log_samples", "--output_path", str(tmp_path), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stderr[-3000:]
    model, processor, _ = seeing
    prompts = []
    for colour in COLOURS:
        image = {"type": "image", "image": Image.new("RGB", (12, 12), colour)}
        content = [image, {"type": "text", "text": "what colour is the shape?"}]
        prompts.append(prompt_of_messages(processor, [{"role": "user", "content": content}]))
    expected = [free_answers(model, processor, [prompt], 5)[0].split("\n\n")[0].strip() for prompt in prompts]
    lines = next(tmp_path.rglob("*samples_colours*.jsonl")).read_text().splitlines()
    samples = sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"] for sample in samples] == expected
    if "choices" in tasks:
        for prompt in prompts:
            prompt.answers = answer_ids(processor, prompt, COLOURS)
        scores = candidate_scores(model, prompts)
        right = sum(int(score.argmax()) == number for number, score in enumerate(scores)) / 4
        results = json.loads(next(tmp_path.rglob("*results.json")).read_text())
        assert results["results"]["choices"]["acc,none"] == pytest.approx(right)


def test_transparent_images_lie_on_white_and_what_is_no_image_is_refused(folder):
    from lmms_eval.api.instance import Instance

    from vora.eval.lmms import VoraForTasks

    with pytest.raises(ValueError, match="--model_args resolution are unknown"):
        VoraForTasks(str(folder / "model"), device="cpu", resolution=224)
    adapter = VoraForTasks(str(folder / "model"), device="cpu")
    adapter.task_dict = {"films": {"test": [{}]}}

    def request(visual):
        arguments = ("what?", {}, lambda document: [visual], 0, "films", "test")
        return Instance("generate_until", arguments, 0, {"task": "films", "doc_id": 0, "repeats": 1})

    with pytest.raises(ValueError, match="films, document 0, gives a str: images alone"):
        adapter.generate_until([request("film.mp4")])
    images = Image.new("RGBA", (12, 12), (0, 0, 0, 0)), Image.new("RGB", (12, 12), "white")
    prompts = [prompt_of_messages(adapter.processor, adapter.messages(request(image))) for image in images]
    assert torch.equal(*(prompt.inputs["pixel_values"] for prompt in prompts))
