"""The model card's text and front matter, from what is known of a model."""

import re

import yaml

from vora.checkpoint.names import command_without_folders, is_hub_id

NOT_STATED = "not stated; see its page"
MADE = {
    "trained": "`vora train`",
    "merged": "`vora train`, then its vision LoRA was merged",
    "imported": "imported",
    "folded": "no training: `vora merge` alone",
}

LOAD_MODEL = """\
With transformers (the model's code is in this folder):

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "THIS_FOLDER"
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
output = model.generate(**inputs, max_new_tokens=50)
answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print(answer)
```

With vora installed: `vora chat image.png -m THIS_FOLDER -q "What is this?"`
"""
LOAD_LLAVA = """\
Its code is vora's: `vora chat image.png -m THIS_FOLDER -q "What is this?"`, or in Python

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
This folder holds vision LoRA and a patch embedding. Where their LLM can be fetched, vora puts them over it by itself:
`vora chat image.png -m THIS_FOLDER -q "What is this?"`. A whole model, for transformers and other runtimes:

```
{command}
vora chat image.png -m my-vora -q "What is this?"
```
"""
LOAD_LLAVA_ADAPTER = """\
This folder holds LoRA and a projector, which do not run by themselves. Merge them first:

```
{command}
vora chat image.png -m my-vora -q "What is this?"
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
RUN is the directory of the run that this folder lies in; what was trained last there is merged. Its recipe is
`recipe.yaml`. The recipe on this card has lost the folders of its paths: fill in where your copies are.
"""


def card_text(record, kind, facts):
    """A whole README.md.

    Args:
        record: from `vora.checkpoint.card.lineage`.
        kind: `model`, `adapter`, `unmerged` or `llm`.
        facts: `vora.checkpoint.card.CardFacts`.
    """
    return f"---\n{_yaml(_front_matter(record, kind))}---\n\n{_text(record, kind, facts)}"


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
            (LOAD_LLAVA_ADAPTER if "encoder" in record else LOAD_ADAPTER).format(command=facts.merge_command)
            + (LOAD_RUN if "RUN" in facts.merge_command else ""),
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
        load = LOAD_LLAVA if kind == "model" else load
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
        cells.append([task, metric, value, f"{num_examples:,}", f"`{command_without_folders(command)}`"])
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
    starts = any((r.get("teacher") or {}).get("init_from_teacher") and r["model"]["llm"] for r in recipes)
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
