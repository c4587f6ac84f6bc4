"""The model card: README.md of a folder in which a model was saved.

What a later model must know of this one (base LLM, teacher, licences, stages) stands in the card's front matter under
`vora`, and each stage's recipe in the text: a model that is trained on from this one keeps its ancestry, and there is
no further file. Folders of this machine are never named, only the last part of their paths.
"""

import json
import logging
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from threading import Thread
from typing import Literal, NamedTuple

import yaml
from huggingface_hub import DatasetCard, ModelCard, get_session, hf_hub_url, is_offline_mode
from huggingface_hub.utils import build_hf_headers

from vora.adapt.lora import is_unmerged

HUB_ID_OF_ALIAS = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
KNOWN_LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0", "easy-vqa": "mit"}
NOT_STATED = "not stated; see its page"
SECONDS_FOR_THE_HUB = 5.0  # for all its pages together: saving does not wait longer for a licence

RECIPE = re.compile(r"^### Recipe (\d+): [^\n]*\n\n(`{3,})yaml\n(.*?)^\2$", flags=re.M | re.S)
MADE = {
    "trained": "`vora train`",
    "merged": "`vora train`, then its vision LoRA was merged",
    "imported": "imported",
}

LOAD_MODEL = """\
With transformers (the model's code is in this folder):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "THIS_FOLDER"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=50)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
```

With vora installed: `vora chat picture.png -m THIS_FOLDER -q "What is this?"`
"""
LOAD_LLAVA = """\
Its code is vora's: `vora chat picture.png -m THIS_FOLDER -q "What is this?"`, or in Python

```python
import vora
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS_FOLDER")
processor = AutoProcessor.from_pretrained("THIS_FOLDER")
```
"""
LOAD_LLM = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "THIS_FOLDER"
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
```
"""
LOAD_ADAPTER = """\
This folder holds vision LoRA and a patch embedding, which do not run by themselves. Merge them first:

```
{command}
vora chat picture.png -m my-vora -q "What is this?"
```
"""
LOAD_UNMERGED = (
    LOAD_MODEL.rstrip()
    + """

Merged, which changes no answer, it runs faster:

```
{command}
```
"""
)
LOAD_RUN = """
RUN is the run directory, in which this folder is called `final` and its recipe `recipe.yaml`. The recipe on this card
has lost the folders of its paths: fill in where your copies are.
"""


class Evaluation(NamedTuple):
    """One measured figure, and the command that makes it again."""

    task: str
    metric: str
    value: float | str
    num_examples: int
    command: str


@dataclass(frozen=True)
class CardFacts:
    """What is known of a saved model; what is left out is said to be not stated, and never guessed.

    Args:
        made: how the weights came about.
        stage: pretrain or finetune.
        base_llm, teacher, encoder: alias, hub id or folder; by default those of `source`'s card.
        source: folder or hub id of the model that this one went on from, or was imported from.
        data: (name, weight) of each source; the weight is None where rows count alike.
        recipe: as a dict.
        losses: {name: last value}.
        logged_step: the step at which `samples_seen` and `losses` were noted.
        evaluation: `Evaluation`s, or tuples of their fields.
        licences: {name of base LLM, teacher or data: licence} where known; the others are looked up.
        merge_command: how a folder with unmerged vision LoRA is merged into one called my-vora.
    """

    made: Literal["trained", "merged", "imported"]
    stage: str
    base_llm: str | None = None
    teacher: str | None = None
    encoder: str | None = None
    source: str | None = None
    data: list = field(default_factory=list)
    recipe: dict | None = None
    steps: int | None = None
    samples_seen: int | None = None
    losses: dict = field(default_factory=dict)
    logged_step: int | None = None
    evaluation: list = field(default_factory=list)
    licences: dict = field(default_factory=dict)
    merge_command: str = "vora merge RUN -o my-vora"


def harmless(write):
    """A card that cannot be written costs a warning, never the model that has just been saved."""

    @wraps(write)
    def guarded(*args, **kwargs):
        try:
            return write(*args, **kwargs)
        except Exception as error:  # whatever it is, the weights matter more
            logging.getLogger(__name__).warning(
                "The model is saved, but without a card: %s: %s", type(error).__name__, error
            )

    return guarded


@harmless
def write_card(folder, facts):
    """Write README.md into a folder in which a model has just been saved.

    Args:
        folder: of a whole VoRA model, of unmerged vision LoRA, or of a language part alone; its files say which.
        facts: `CardFacts`.

    Returns:
        Path of the card, or None if it could not be written.
    """
    folder = Path(folder)
    record = lineage(facts)
    kind = _kind_of(folder)
    text = f"---\n{_yaml(_front_matter(record, kind))}---\n\n{_text(record, kind, facts)}"
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder / "README.md"


def lineage(facts):
    """What is known of a model and of those it came from, in names that may be published.

    Returns:
        {"base_llm", "teacher", and where there is one "encoder": names; "licences": {name: licence}; "stages": [first,
        ..., this one]}.
    """
    before = (read_card(facts.source) if facts.source else None) or {}
    no_teacher = "none" if facts.recipe is not None and facts.source is None else "not stated"
    stage = {
        "stage": facts.stage,
        "made": facts.made,
        "source": published(facts.source) if facts.source else None,
        "data": [{"name": published(name), "weight": weight} for name, weight in facts.data],
        "steps": facts.steps,
        "samples_seen": facts.samples_seen,
        "losses": {name: float(f"{value:.6g}") for name, value in facts.losses.items()},
        "logged_step": facts.logged_step,
        "recipe": _without_folders(facts.recipe),
    }
    kinds = {name: DatasetCard for name, _ in facts.data}
    kinds |= {name: ModelCard for name in (facts.base_llm, facts.teacher, facts.encoder) if name}
    inherited = before.get("licences", {})
    known = {name: licence for name, licence in inherited.items() if is_hub_id(name)}  # a folder may be another one
    known |= {published(name): licence for name, licence in facts.licences.items()}
    found = _looked_up({name: kind for name, kind in kinds.items() if published(name) not in known})
    encoder = published(facts.encoder) if facts.encoder else before.get("encoder")
    return {
        "base_llm": published(facts.base_llm) if facts.base_llm else before.get("base_llm", "not stated"),
        "teacher": published(facts.teacher) if facts.teacher else before.get("teacher", no_teacher),
        **({"encoder": encoder} if encoder else {}),
        "licences": inherited | known | found,
        "stages": [*before.get("stages", []), {key: value for key, value in stage.items() if value is not None}],
    }


def read_card(model):
    """What a model's card says of its lineage (see `lineage`), or None where there is no card of ours.

    Args:
        model: folder or hub id.
    """
    card = _cards({str(model): ModelCard}).get(str(model))
    record = card.data.to_dict().get("vora") if card else None
    if not isinstance(record, dict) or not record.get("stages"):
        return None
    for number, _, recipe in RECIPE.findall(card.text):
        record["stages"][int(number) - 1]["recipe"] = yaml.safe_load(recipe)
    return record


def is_hub_id(name):
    """Whether a name is owner/name on the hub, and nothing on this machine."""
    is_file = re.search(r"\.(jsonl?|parquet|arrow|tar|gguf|ya?ml)$", name)
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)) and not is_file and not os.path.exists(name)


def published(name):
    """A name for everyone's eyes: a hub id as it is, an alias as the hub id behind it, of a path its last part."""
    name = HUB_ID_OF_ALIAS.get(str(name), str(name))
    return name if is_hub_id(name) or re.match(r"(?!file:)\w+://", name) else _last_part(name)


def _last_part(path):
    return os.path.basename(os.path.abspath(path.replace("\\", "/")))


def _without_folders(value):
    """A recipe whose paths are cut down to their last parts."""
    if isinstance(value, dict):
        return {key: _without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_folders(entry) for entry in value]
    if isinstance(value, str) and "\n" not in value:
        begins_as_path = re.match(r"[/~\\]|\.\.?[/\\]|[A-Za-z]:[/\\]|file:", value)
        if begins_as_path or (os.path.exists(value) and re.search(r"[/\\]", value)):
            return _last_part(value)
    return value


def _command_without_folders(command):
    """A command line whose paths are cut down, behind `--option=` too."""
    words = [word.rpartition("=") for word in command.split(" ")]
    return " ".join(before + equals + _without_folders(word) for before, equals, word in words)


def _looked_up(kinds):
    """{published name: licence} of models and datasets, from their cards."""
    cards = _cards({name: kind for name, kind in kinds.items() if published(name) not in KNOWN_LICENCES})
    found = {name: _licence(cards[name]) if name in cards else None for name in kinds}
    return {published(name): KNOWN_LICENCES.get(published(name)) or found[name] or NOT_STATED for name in kinds}


def _licence(card):
    """The licence in a card's front matter, or None; `other (NAME)` where it is one of its own."""
    licence = card.data.to_dict().get("license")
    if isinstance(licence, list):
        return ", ".join(map(str, licence)) or None
    name = card.data.to_dict().get("license_name")
    return f"other ({name})" if licence == "other" and name else licence and str(licence)


def _cards(kinds):
    """{name: card} of those that have one here or, unless offline, on the hub; all at once, within a few seconds."""
    cards = {}

    def read(name, kind, text_of):
        with suppress(Exception):  # no such page, no network, no valid front matter
            cards[name] = kind(text_of(), ignore_metadata_errors=True)

    readers = []
    for name, kind in kinds.items():
        if os.path.isdir(name):
            read(name, kind, partial(Path(name, "README.md").read_text, encoding="utf-8-sig"))
        elif is_hub_id(name) and not is_offline_mode():
            page = partial(_hub_page, name, kind.repo_type)
            readers.append(Thread(target=read, args=(name, kind, page), daemon=True))
    for reader in readers:
        reader.start()
    deadline = time.monotonic() + SECONDS_FOR_THE_HUB
    for reader in readers:
        reader.join(max(0.0, deadline - time.monotonic()))
    return dict(cards)


def _hub_page(name, repo_type):
    """Text of a card on the hub, asked for once: `ModelCard.load` would go on asking, and say so, for a minute."""
    url = hf_hub_url(name, "README.md", repo_type=repo_type)
    answer = get_session().get(url, headers=build_hf_headers(), timeout=SECONDS_FOR_THE_HUB, follow_redirects=True)
    answer.raise_for_status()
    return answer.text


def _kind_of(folder):
    """By a folder's files: `adapter` (vision LoRA alone), `unmerged` (with the model beside it), `model` (all of it,
    merged) or `llm` (the language part)."""
    if (folder / "adapter_config.json").exists():
        return "unmerged" if is_unmerged(folder) else "adapter"
    is_whole = json.loads((folder / "config.json").read_text())["model_type"].startswith("vora")
    return "model" if is_whole else "llm"


def _front_matter(record, kind):
    licence = record["licences"].get(record["base_llm"], NOT_STATED)
    front = {"license": licence if re.fullmatch(r"[\w.-]+", licence) else "other"}
    if own := re.fullmatch(r"other \((.+)\)", licence):
        front["license_name"] = own.group(1)
    if is_hub_id(record["base_llm"]):
        front["base_model"] = record["base_llm"]
    front["pipeline_tag"] = "text-generation" if kind == "llm" else "image-text-to-text"
    front["library_name"] = "transformers"
    front["tags"] = ["vora", "llava" if "encoder" in record else "vision-as-lora"] + (
        ["lora"] if kind in ("adapter", "unmerged") else []
    )
    datasets = [source["name"] for stage in record["stages"] for source in stage["data"]]
    if found := [name for name in dict.fromkeys(datasets) if is_hub_id(name)]:
        front["datasets"] = found
    stages = [{key: value for key, value in stage.items() if key != "recipe"} for stage in record["stages"]]
    return front | {"vora": record | {"stages": stages}}


def _text(record, kind, facts):
    name, llm = record["base_llm"].rpartition("/")[2], f"`{record['base_llm']}`"
    if name == "not stated":
        name = llm = "An LLM"
    title, opening, load = {
        "model": (
            f"# {name}, with sight",
            f"{llm} that reads images of any size without a vision encoder, by the method of "
            "[Vision as LoRA](https://arxiv.org/abs/2503.20680): what it learned is merged into its weights.",
            LOAD_MODEL,
        ),
        "adapter": (
            f"# Vision LoRA for {name}, not merged yet",
            f"{llm} learned to see by the method of [Vision as LoRA](https://arxiv.org/abs/2503.20680); this is what "
            "it learned, kept apart from its weights.",
            LOAD_ADAPTER.format(command=facts.merge_command) + (LOAD_RUN if "RUN" in facts.merge_command else ""),
        ),
        "unmerged": (
            f"# {name}, with sight in a vision LoRA, not merged yet",
            f"{llm} that reads images without a vision encoder, by the method of "
            "[Vision as LoRA](https://arxiv.org/abs/2503.20680): the whole model, and what it learned beside it.",
            LOAD_UNMERGED.replace("{command}", facts.merge_command),
        ),
        "llm": (
            f"# {name}, language part of a VoRA model",
            f"{llm} after it learned to see, and without its eyes: the language part alone, a stock LLM of the same "
            "architecture and parameter names. It reads text and no images.",
            LOAD_LLM,
        ),
    }[kind]
    if "encoder" in record and kind != "llm":
        title = f"# {name} with an encoder, LLaVA's way" + (", not merged yet" if kind != "model" else "")
        opening = (
            f"{llm} that reads images through the frozen encoder `{record['encoder']}` and a projector, as "
            "[LLaVA](https://arxiv.org/abs/2304.08485) does: what a VoRA model of the same recipe is measured against."
        )
        load = (
            LOAD_LLAVA
            if kind == "model"
            else load.replace("vision LoRA and a patch embedding", "LoRA and a projector")
        )
    sections = [f"{title}\n\n{opening}", f"## How to load it\n\n{load}", _how_it_was_made(record)]
    if kind != "llm":
        sections.append(_evaluation(facts.evaluation))
    sections.append(_licences(record, kind))
    if kind != "llm":
        sections += _recipes(record["stages"])
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _how_it_was_made(record):
    stages = record["stages"]
    rows = [
        ("how", [_how(stage) for stage in stages]),
        ("data", [_data(stage["data"]) for stage in stages]),
        ("steps", [_count(stage.get("steps")) for stage in stages]),
        ("samples seen", [_count(stage.get("samples_seen")) + _when(stage) for stage in stages]),
        ("last losses", [_losses(stage) for stage in stages]),
    ]
    table = _table(["stage", *(stage["stage"] for stage in stages)], [[name, *cells] for name, cells in rows])
    encoder = f"* Encoder: `{record['encoder']}`\n" if "encoder" in record else ""
    return (
        f"## How it was made\n\n* Base LLM: {_quoted(record['base_llm'])}\n* Teacher: {_quoted(record['teacher'])}\n"
        f"{encoder}\n{table}"
    )


def _how(stage):
    origin = f", from `{stage['source']}`" if "source" in stage else ""
    return MADE[stage["made"]] + origin


def _data(sources):
    weights = ["" if source["weight"] is None else f" (weight {source['weight']:g})" for source in sources]
    return ", ".join(f"`{s['name']}`{weight}" for s, weight in zip(sources, weights)) or "not stated"


def _count(number):
    return "not stated" if number is None else f"{number:,}"


def _losses(stage):
    losses = ", ".join(f"{name} {value:.4g}" for name, value in stage["losses"].items())
    return losses + _when(stage) if losses else "not stated"


def _when(stage):
    step = stage.get("logged_step")
    return "" if step in (None, stage.get("steps")) else f" (by step {step:,})"


def _quoted(name):
    return name if name in ("none", "not stated") else f"`{name}`"


def _evaluation(rows):
    if not rows:
        return "## Evaluation\n\nnot evaluated"
    cells = []
    for task, metric, value, num_examples, command in rows:
        value = value if isinstance(value, str) else f"{value:.4g}"
        cells.append([task, metric, value, f"{num_examples:,}", f"`{_command_without_folders(command)}`"])
    return "## Evaluation\n\n" + _table(["task", "metric", "value", "examples", "command"], cells)


def _licences(record, kind):
    data = [source["name"] for stage in record["stages"] for source in stage["data"]]
    parts = [("base LLM", record["base_llm"]), ("teacher", record["teacher"])]
    parts += [("encoder", record["encoder"])] if "encoder" in record else []
    parts += [("data", name) for name in dict.fromkeys(data)]
    rows = [
        [part, f"`{name}`", record["licences"].get(name, NOT_STATED)]
        for part, name in parts
        if name not in ("none", "not stated")
    ]
    if kind in ("model", "unmerged") and "encoder" not in record:
        rows.append(["model code (`*.py`)", "`vora`", "apache-2.0"])
    recipes = [stage.get("recipe") or {} for stage in record["stages"]]
    starts = any((r.get("teacher") or {}).get("starts_eyes") and r["model"]["llm"] for r in recipes)
    notes = "The front matter states the base LLM's licence, or `other` where that is not known."
    if record["teacher"] not in ("none", "not stated"):
        notes += " The teacher is no part of this model"
        notes += ", but the patch embedding started as the teacher's." if starts and kind != "llm" else "."
    return f"## Licences of the parts\n\n{_table(['part', 'name', 'licence'], rows)}\n\n{notes}"


def _recipes(stages):
    """Each stage's recipe, in a fence longer than any within; `read_card` finds them again."""
    for number, stage in enumerate(stages, 1):
        if "recipe" not in stage:
            yield f"### Recipe {number}: {stage['stage']}\n\nnot stated"
            continue
        text = _yaml(stage["recipe"])
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield f"### Recipe {number}: {stage['stage']}\n\n{fence}yaml\n{text}{fence}"


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _yaml(values):
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
