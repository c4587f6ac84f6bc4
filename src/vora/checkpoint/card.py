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

from vora.build.lora import is_unmerged
from vora.checkpoint.card_text import NOT_STATED, card_text
from vora.checkpoint.names import is_hub_id, published, without_folders

KNOWN_LICENCES = {"HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0", "easy-vqa": "mit"}
SECONDS_FOR_THE_HUB = 5.0  # for all its pages together: saving does not wait longer for a licence

RECIPE = re.compile(r"^### Recipe (\d+): [^\n]*\n\n(`{3,})yaml\n(.*?)^\2$", flags=re.M | re.S)


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
        asks_hub: whether they are looked up on the hub too.
        merge_command: how a folder with unmerged vision LoRA is merged into one called my-vora.
    """

    made: Literal["trained", "merged", "imported", "folded"]
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
    asks_hub: bool = True


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
    (folder / "README.md").write_text(card_text(record, kind, facts), encoding="utf-8")
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
        "recipe": without_folders(facts.recipe),
    }
    kinds = {name: DatasetCard for name, _ in facts.data}
    kinds |= {name: ModelCard for name in (facts.base_llm, facts.teacher, facts.encoder) if name}
    inherited = before.get("licences", {})
    known = {name: licence for name, licence in inherited.items() if is_hub_id(name)}  # a folder may be another one
    known |= {published(name): licence for name, licence in facts.licences.items()}
    unknown = {name: kind for name, kind in kinds.items() if published(name) not in known}
    if not facts.asks_hub:
        unknown = {n: k for n, k in unknown.items() if not is_hub_id(n) or published(n) in KNOWN_LICENCES}
    found = _looked_up(unknown)
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
