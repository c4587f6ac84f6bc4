"""What people get wrong: each mistake is answered in at most three lines, which name what is wrong and the cure."""

import json
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import yaml
from command import vora
from messages import write_questions
from tiny import save_tiny_llm, save_tiny_vit
from transformers import AutoConfig, ViTMAEConfig, ViTMAEModel

from vora.build import hub

SMALL = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
CODE = """from transformers import PreTrainedConfig
open({ran!r}, "w")
class OwnConfig(PreTrainedConfig):
    model_type = "own_code"
"""


def halve(file: Path):
    """What an interrupted copy leaves."""
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder as people have it: LLM, teacher, data, recipe, a run and its merged model, and what is broken."""
    here = tmp_path_factory.mktemp("here")
    llm, vit = save_tiny_llm(here / "tiny-llama"), save_tiny_vit(here / "vit")
    write_questions(here / "train.jsonl")
    training = {"max_steps": 1, "per_device_train_batch_size": 1, "save_steps": 1, "use_cpu": True}
    recipe = {
        "model": {"llm": "tiny-llama"},
        "teacher": {"name": "vit"},
        "data": {"sources": [{"path": "train.jsonl"}], "sequence_length": 64},
        "training": training,
    }
    (here / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert vora("train", "recipe.yaml", "--out", "runs/stage1", cwd=here).returncode == 0
    merged = vora("merge", "runs/stage1", "-o", "my-vora", "--adapter-out", "adapter", cwd=here)
    assert merged.returncode == 0, merged.stderr
    two = {"stage": "finetune", "model": {"vora": "runs/stage1"}, "data": recipe["data"], "training": training}
    (here / "two.yaml").write_text(yaml.safe_dump(two))
    (here / "empty.yaml").write_text("# nothing\n")
    (here / "tabs.yaml").write_text("model:\n\tllm: tiny-llama\n")
    (here / "empty").mkdir()
    (here / "unsaved").mkdir()
    shutil.copy(here / "runs" / "stage1" / "recipe.yaml", here / "unsaved")
    (here / "empty.jsonl").write_text("")
    (here / "notes.txt").write_text("no image")
    (here / "columns.jsonl").write_text('{"picture": "red.png", "prompt_text": "what?", "reply": "red"}\n')
    (here / "missing.jsonl").write_text('{"image": "no.png", "question": "what?", "answer": "red"}\n')
    (here / "broken.jsonl").write_text('{"image": "red.png", \'caption\': "a red thing"}\n')
    (here / "silent.jsonl").write_text('{"image": "red.png", "caption": ""}\n')
    (here / "one.jsonl").write_text('{"image": "red.png", "caption": "a red thing"}\n')
    (here / "headless.csv").write_text("red.png,a red thing\nblue.png,a blue thing\n")
    (here / "table.xlsx").write_bytes(b"PK")
    (here / "photos").mkdir()
    shutil.copy(here / "red.png", here / "photos")
    (here / "colon.yaml").write_text("model: llm: tiny-llama\n")
    (here / "bracket.yaml").write_text("data: {sources: [train.jsonl}\n")
    (here / "spec.yaml").write_text("recipe: recipe.yaml\nvariants: {a: []}\n")
    (here / "folder.yaml").mkdir()
    hugging_face = {"model_name_or_path": "tiny-llama", "output_dir": "x", "num_train_epochs": 1, "bf16": True}
    (here / "args.json").write_text(json.dumps(hugging_face))
    (here / "stage2.yaml").write_text(yaml.safe_dump(two | {"teacher": {"name": "vit"}, "lora": {"rank": 4}}))
    (here / "semicolon.csv").write_text("image;question;answer\nred.png;what; now?;red\n")
    (here / "spoken.jsonl").write_text('{"messages": "what is this?", "image": "red.png"}\n')
    (here / "page.png").write_text("<html>404</html>")
    (here / "page.jsonl").write_text('{"image": "page.png", "caption": "a red thing"}\n')
    (here / "url.jsonl").write_text('{"image": "http://example.org/red.png", "caption": "a red thing"}\n')
    for kind in ("llava", "qwen2_vl", "t5"):
        AutoConfig.for_model(kind).save_pretrained(here / kind)
    ViTMAEModel(ViTMAEConfig(**SMALL, image_size=16, patch_size=8)).save_pretrained(here / "mae")
    halve(Path(shutil.copytree(llm, here / "llm-cut")) / "model.safetensors")
    (Path(shutil.copytree(llm, here / "llm-empty")) / "model.safetensors").unlink()
    (Path(shutil.copytree(llm, here / "llm-mute")) / "tokenizer.json").unlink()
    halve(Path(shutil.copytree(vit, here / "vit-cut")) / "model.safetensors")
    halve(Path(shutil.copytree(here / "my-vora", here / "vora-cut")) / "model.safetensors")
    own = Path(shutil.copytree(llm, here / "own-code"))
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "own_code", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "own.py").write_text(CODE.format(ran=str(here / "ran")))
    info = json.loads((here / "adapter" / "vora.json").read_text())
    shutil.copytree(here / "adapter", here / "own-adapter")
    (here / "own-adapter" / "vora.json").write_text(json.dumps(info | {"base_llm": str(own)}))
    return here


CHAT = "chat red.png -q what? -m"
TRAIN = "train recipe.yaml --out new"
MISTAKES = {
    "models": [
        (f"{CHAT} my-vra", "no .*/my-vra, .* Did you mean my-vora"),
        (f"{CHAT} ./runs/stge1", "path is never looked for on the hub. Did you mean ./runs/stage1"),
        (f"{CHAT} runs/stge1", "no .*/runs/stge1, and HF_HUB_OFFLINE .* Did you mean runs/stage1"),
        (f"{CHAT} ~/none/my-vora", "no /.*/none/my-vora, and a path"),
        (f"{CHAT} my-vora/model.safetensors", "is a file: name the folder .* my-vora"),
        (f"{CHAT} my-vora.gguf", "never looked for on the hub"),
        (f"{CHAT} runs", "holds 1 of them: name one, such as runs/stage1"),
        (f"{CHAT} empty", "holds no config.json .* check the path"),
        (f"{CHAT} unsaved", "has not saved anything yet"),
        (f"{CHAT} smollm2-135m", "is an LLM without vision: .*vora train"),
        (f"{CHAT} tiny-llama", "is a llama model without vision: .*vora train"),
        (f"{CHAT} llava", "is a llava model with a vision encoder"),
        (f"{CHAT} vora-cut", "vora-cut has weights that are damaged or cut off .* again"),
        (f"{CHAT} adapter", "--llm LLM"),
        (f"{CHAT} me/none", "no .*/me/none, and HF_HUB_OFFLINE is set"),
        (f"{CHAT} my-vora --llm tiny-llama", "has its own LLM: leave --?llm out"),
    ],
    "llm": [
        (
            f"{TRAIN} model.llm=smollm2-135",
            "model.llm smollm2-135: .*no alias .*smollm2-135m.* mean smollm2-135m",
        ),
        (f"{TRAIN} model.llm=./tiny-lama", "model.llm ./tiny-lama: .* Did you mean ./tiny-llama"),
        (f"{TRAIN} model.llm=tiny.gguf", "never looked for on the hub"),
        (f"{TRAIN} model.llm=my-vora", "is a VoRA model, .* as model.vora=.*my-vora"),
        (f"{TRAIN} model.llm=runs/stage1", "is a run of vora train: .* model.vora=.*stage1"),
        (f"{TRAIN} model.llm=llava", "llava model, which sees by a vision encoder .*a llama model"),
        (f"{TRAIN} model.llm=qwen2_vl", "qwen2_vl model, which sees by a vision encoder .*a qwen2 model"),
        (f"{TRAIN} model.llm=t5", "is a t5 model, and no LLM"),
        (f"{TRAIN} model.llm=empty", "holds no config.json and 0 GGUF files"),
        (f"{TRAIN} model.llm=llm-cut", "llm-cut has weights that are damaged or cut off"),
        (f"{TRAIN} model.llm=llm-empty", "llm-empty holds no weights"),
        (f"{TRAIN} model.llm=llm-mute", "llm-mute has no tokenizer"),
        (f"{TRAIN} model.llm=own-code", "own-code needs code of its own: .* --trust-remote-code"),
        (f"{TRAIN} model.vora=my-vora", "exactly one of llm"),
    ],
    "teacher": [
        (f"{TRAIN} teacher.name=no/vit", "teacher.name no/vit: .*no/vit, and HF_HUB_OFFLINE .* such as google/vit"),
        (f"{TRAIN} teacher.name=./vitt", "teacher.name ./vitt: .* Did you mean ./vit"),
        (
            f"{TRAIN} teacher.name=tiny-llama",
            "teacher.name .*tiny-llama is a llama model, and no plain ViT",
        ),
        (f"{TRAIN} teacher.name=mae", "teacher .*mae: .* hides 75% of the patches .* only plain ViTs"),
        (f"{TRAIN} teacher.name=vit-cut", "vit-cut has weights that are damaged"),
        (f"{TRAIN} teacher.name=empty", "empty holds no configuration of a model that transformers knows"),
    ],
    "runs": [
        ("train two.yaml --out new", "merged model: vora merge .*stage1 -o OUT, and model.vora=OUT"),
        ("train two.yaml model.vora=no-run --out new", "model.vora no-run: there is no"),
        ("train recipe.yaml --out runs/stage1", "already holds a run: add --resume .* another --out"),
        (f"{TRAIN} --resume", "no checkpoint to resume from: start without --resume"),
        ("merge my-vora -o new", "is merged already: use it as it is"),
        ("merge runs/stage2 -o new", "no .*/runs/stage2"),
        ("merge runs/stage1 -o my-vora", "is not empty: choose another --out"),
        ("merge tiny-llama -o new", "without vision"),
        ("import-reference my-vora --llm tiny-llama -o new", "no checkpoint of the released code"),
    ],
    "data": [
        (
            "data recipe.yaml data.sources.0.path=trian.jsonl --out new",
            "no file .*trian.jsonl.* mean train.jsonl",
        ),
        ("data recipe.yaml data.sources.0.path=empty.jsonl --out new", "empty.jsonl"),
        ("data recipe.yaml data.sources.0.path=notes.txt --out new", "notes.txt is none of the kinds"),
        ("data recipe.yaml data.sources.0.path=columns.jsonl --out new", "columns"),
        ("data recipe.yaml data.sources.0.path=missing.jsonl --out new", "All 1 samples are bad: .*bad_samples.jsonl"),
        ("data recipe.yaml data.sources.0.path=broken.jsonl --out new", "It is no JSON: .*double quotes: line 1"),
        ("data recipe.yaml data.sources.0.path=silent.jsonl --out new", "It has 0 captions"),
        ("data recipe.yaml data.sources.0.path=headless.csv --out new", "'a red thing'.* in the source's `columns`"),
        ("data recipe.yaml data.sources.0.path=table.xlsx --out new", "none of the kinds .*csv.*: .* convert it"),
        ("data recipe.yaml data.sources.0.path=photos --out new", "put a text file of the same name .* beside each"),
        (f"{TRAIN} data.sequence_length=8", "All of the last .* are bad .* The last: .* sequence"),
        (f"{TRAIN} data.sources.0.path=one.jsonl data.validation.share=0.9", "are bad or held out"),
        (f"{TRAIN} data.validation.sources.0.path=train.jsonl", "which is trained on too: name another split"),
        ("init new --data columns.jsonl --llm tiny-llama --teacher vit", "'reply'.* --column image=photo"),
        ("eval -m my-vora -o new.json --task classify --data train.jsonl", "no example of .*classify.* has no label"),
        ("eval -m my-vora -o new.json --task captions --data train.jsonl", "has no captions or .* only answer"),
        ("eval -m my-vora -o empty --task vqa --data train.jsonl", "'--out' .* file 'empty' is a directory"),
        ("eval -m my-vora --task vqa --data no.jsonl -o new.json", "no.jsonl"),
        ("eval -m my-vora --task vqqa --data train.jsonl -o new.json", "no task 'vqqa': choose among"),
        ("eval -m my-vra --task vqa --data train.jsonl -o new.json", "Did you mean my-vora"),
        ("chat no.png -q what? -m my-vora", "no.png: there is no such file"),
        ("chat notes.txt -q what? -m my-vora", "notes.txt: it is not an image"),
        ("inspect red.png -m my-vora --teacher no-vit", "teacher no-vit: there is no .*/no-vit"),
    ],
    "swapped": [  # one thing given where another is wanted
        ("train train.jsonl", "train.jsonl is data, and no recipe: vora init mine --data train.jsonl writes one"),
        ("train tiny-llama", "tiny-llama is a model's folder, and no recipe: name a YAML file"),
        ("train folder.yaml", "folder.yaml is a folder, and no recipe"),
        ("train args.json", "unknown key model_name_or_path: it is model.llm here; .*output_dir: it is --out here"),
        ("train stage2.yaml", "stage finetune has no teacher, .* set teacher=null"),
        (f"{TRAIN} training.output_dir=x", "training.output_dir is --out on the command line"),
        (f"{TRAIN} training.optim=adam", "optim is 'adam' .did you mean adamw_torch or"),
        (f"{TRAIN} training.deepspeed=ds.json", "deepspeed is not installed: pip install deepspeed"),
        (f"{TRAIN} training.report_to=tensorbord", "report_to tensorbord is unknown .did you mean tensorboard"),
        (f"{TRAIN} training.lr_scheduler_kwargs=x", "lr_scheduler_kwargs is 'x': give keys with values"),
        (f"{TRAIN} data.sequence_length=9999999", "sequence_length is 9999999, but the LLM's context holds 256"),
        (f"{TRAIN} training.max_steps = 5", "'training.max_steps' is no override: write key=value without spaces"),
        (f"{TRAIN} model.llm=vit", "The LLM .*vit is a vit model, and no LLM"),
        (f"{TRAIN} model.llm=train.jsonl", "model.llm .*train.jsonl is a file: name the folder of a model"),
        (f"{TRAIN} teacher.name=train.jsonl", "teacher.name .*train.jsonl is a file: name the folder of a model"),
        (f"{TRAIN} teacher.name=runs/stage1", "teacher.name .*stage1 holds no configuration .* check the path"),
        (f"{TRAIN} data.sources.0.path=my-vora", "my-vora is a model's folder, and no data"),
        (f"{TRAIN} data.sources.0.path=semicolon.csv", "It has 4 cells, but the first line names 3 columns"),
        (f"{TRAIN} data.sources.0.path=spoken.jsonl", "Its turns are a text, and no list .*: 'what is this.'"),
        (f"{TRAIN} data.sources.0.path=page.jsonl", "page.png: it is not an image of a known format"),
        (f"{TRAIN} data.sources.0.path=url.jsonl", "it is a URL, and data.allow_urls .* is false"),
        ("plan recipe.yaml model.llm=vit", "The LLM .*vit is a vit model, and no LLM"),
        ("init new --llm vit --teacher vit", "The LLM vit is a vit model, and no LLM"),
        ("init new --llm tiny-llama --teacher tiny-llama", "--teacher tiny-llama is a llama model, and no plain ViT"),
        ("init new --llm tiny-llama --teacher resnet", "--teacher resnet: there is no .* such as google/vit"),
        ("init new --llm tiny-llama", "No --teacher was given, and .* Give --teacher a folder"),
        ("chat my-vora red.png -q what?", "my-vora is a folder, and no image: .* -m my-vora"),
        ("inspect photos -m my-vora", "photos is a folder, and no image"),
        ("eval my-vora --task vqa --data train.jsonl -o new.json", "my-vora is a model's folder, and no data: .* -m"),
        ("eval -m my-vora --task vqa --data train.jsonl --split tset -o new.json", "train.jsonl is a file: leave it"),
        ("eval -m my-vora --task classify --labels no.txt --data train.jsonl -o new.json", "'--labels': .*no.txt"),
        ("verify -m my-vora --runtime llama.cpp --files none", "'--files': .*none.* does not exist"),
        ("verify -m my-vora --runtime remote-code --json red.png/x", "red.png is a file, so that"),
        ("merge runs/stage1 -o red.png/x", "red.png is a file, so that .* cannot be written in it"),
    ],
    "recipe": [
        ("train no.yaml", "Cannot read recipe no.yaml"),
        ("train empty.yaml", "empty.yaml holds no keys"),
        ("train tabs.yaml", "tabs.yaml is no valid YAML"),
        ("train colon.yaml", "no valid YAML: line 1, column 11: mapping values are not allowed here"),
        ("train bracket.yaml", "no valid YAML: line 1, column 29: expected ',' or"),
        ("train spec.yaml", "is a specification of an ablation, and no recipe: vora ablate spec.yaml"),
        ("ablate recipe.yaml", "is a recipe, and no specification: write a file with recipe: recipe.yaml"),
        ("train runs/stage1", "is a folder, .*: name its recipe, runs/stage1/recipe.yaml"),
        ("train recipe.yaml --out notes.txt", "'--out' .* 'notes.txt' is a file"),
        ("train recipe.yaml --max-steps 5", "No such option: --max-steps; .* set as training.max_steps=100"),
        (f"{TRAIN} training.learning_rate='2e-4'", "learning_rate is '2e-4': give a number"),
        (f"{TRAIN} training.per_device_train_batch_size=0", "is 0: give at least 1"),
        (f"{TRAIN} training.num_epochs=3", "did you mean num_train_epochs"),
        (f"{TRAIN} lr=1e-4", "unknown key lr: it is training.learning_rate here"),
        (f"{TRAIN} max_steps=4", "unknown key max_steps: it is training.max_steps here"),
        (f"{TRAIN} rank=4", "unknown key rank: it is lora.rank here"),
        (f"{TRAIN} lora.r=4", "unknown key lora.r: it is lora.rank here"),
        (f"{TRAIN} lora.target_modules=q_proj", "lora.target_modules: 'q_proj' is no list: write .q_proj."),
        (f"{TRAIN} data.sources=train.jsonl", "data.sources: 'train.jsonl' is no list: write .train.jsonl."),
        (f"{TRAIN} teacher=vit", "teacher: 'vit' is no section of keys: .* such as teacher.name"),
        (f"{TRAIN} model.dtype=fp16", "model.dtype: .*'float32', 'bfloat16' or 'float16'"),
        ("chat red.png -q what? -m my-vora --dtype fp16", "fp16 is none of float32, bfloat16, float16"),
        ("chat red.png -q what? -m my-vora --max-image-tokens 0", "'--max-image-tokens': .* 1"),
        (f"{TRAIN} lora.rnak=4", "unknown key lora.rnak .did you mean rank"),
        (f"{TRAIN} lora.rank=many", "lora.rank: .* integer"),
        (f"{TRAIN} training.max_step=4", "max_step .*did you mean max_steps"),
        (f"{TRAIN} lora.rank", "write key=value"),
        (f"{TRAIN} training.max_steps=0", "max_steps"),
        ("plan recipe.yaml --gpu h3000", "choose among"),
    ],
}


def answer_to(command, here, input=""):
    """The error that a command ends with, in lines of a terminal of 80 columns."""
    result = vora(*command.split(), cwd=here, input=input)
    assert result.returncode in (1, 2) and "Traceback" not in result.stderr, f"{command}: {result.stderr}"
    error = result.stderr[result.stderr.rindex("error:") :]
    return " ".join(error.split()), textwrap.wrap(error.replace(f"{here}/", ""), 80)


@pytest.mark.parametrize("group", MISTAKES)
def test_each_mistake_is_answered_in_three_lines_with_its_cure(here, group):
    wrong = []
    for command, wanted in MISTAKES[group]:
        text, lines = answer_to(command, here)
        if not re.search(wanted, text) or len(lines) > 3:
            wrong.append(f"{command}\n  wanted: {wanted}\n  got ({len(lines)} lines): {text}")
    assert not wrong, "\n".join(wrong)
    assert not (here / "new").exists() or not (here / "new" / "final").exists()


def test_a_file_that_may_not_be_read_is_named_with_the_cure(here, monkeypatch):
    """As for all but the superuser, who may."""

    def refused(path, *given, **options):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("vora.data.json_source.lines", refused)
    text, lines = answer_to(f"{TRAIN}", here)
    assert "train.jsonl: Permission denied. Check the file, and who may read it" in text and len(lines) <= 3


def test_lines_of_a_chat_never_make_code_of_a_model_run(here, monkeypatch):
    text, _ = answer_to("chat -m own-adapter", here, input="y\nyes\ny\n")
    assert "needs code of its own: read it, and then give --trust-remote-code" in text
    assert not (here / "ran").exists()
    monkeypatch.setattr(hub, "_trusts", [])
    text, _ = answer_to("chat -m own-adapter --trust-remote-code", here, input="y\n")
    assert "own_code model" in text and (here / "ran").exists()


def test_an_unreachable_hub_is_known_at_once(here, monkeypatch):
    """Without a second request, and for a name in the hub's cache out of that alone."""
    asked = []
    monkeypatch.setattr(hub, "_state", {})
    monkeypatch.setattr(hub, "_connects", lambda host, port: asked.append((host, port)))
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for _ in range(2):
        assert "cannot be reached" in hub.hub_problem("me/none")
    assert len(asked) == 1
    with hub.loading("me/none", "The model"):
        assert hub.constants.HF_HUB_OFFLINE
    assert not hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: "config.json")
    assert hub.located("me/some", "model.llm", "me/some") == "me/some"


@pytest.mark.parametrize(
    ("proxy", "wanted"), [("", ("hub.example", 443)), ("http://gate.example:3128", ("gate.example", 3128))]
)
def test_the_hub_is_reached_through_the_proxy(monkeypatch, proxy, wanted):
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": proxy} if proxy else {})
    monkeypatch.setattr(hub, "proxy_bypass", lambda host: False)
    assert hub._first_host("https://hub.example") == wanted
