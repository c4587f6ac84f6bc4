"""Where a model comes from: what stands in the front matter of its card under `vora`, read and continued.

It holds {"base_llm", "teacher", and where there is one "encoder": names; "licences": {name: licence}; "stages":
[first, ..., this one]}; each stage's recipe stands in the card's text. A model that is trained on from this one keeps
its ancestry. Nothing is asked of a network.
"""

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCard, try_to_load_from_cache

from vora.checkpoint.names import is_hub_id, published, without_folders

if TYPE_CHECKING:
    from vora.checkpoint.card import CardFacts

NOT_STATED = "not stated; see its page"
KNOWN_LICENCES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "HuggingFaceTB/SmolLM2-360M-Instruct": "apache-2.0",
    "Qwen/Qwen3-1.7B": "apache-2.0",
    "Qwen/Qwen2.5-7B-Instruct": "apache-2.0",
    "facebook/dinov2-base": "apache-2.0",
    "google/vit-base-patch16-224": "apache-2.0",
    "easy-vqa": "mit",
}
RECIPE = re.compile(r"^### Recipe (\d+): [^\n]*\n\n(`{3,})yaml\n(.*?)^\2$", flags=re.M | re.S)


def read_card(model: Path | str) -> dict[str, Any] | None:
    """The lineage on the card of a folder, or of a hub id that was fetched before, each stage with its recipe; None
    where there is no card of ours."""
    card = _card(str(model))
    record = card and card.data.to_dict().get("vora")
    if not isinstance(record, dict) or not record.get("stages") or card is None:
        return None
    for number, _, recipe in RECIPE.findall(card.text):
        record["stages"][int(number) - 1]["recipe"] = yaml.safe_load(recipe)
    return record


def lineage(facts: "CardFacts") -> dict[str, Any]:
    """What is known of a model and of those it came from, in names that may be published."""
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
    names = [name for name, _ in facts.data] + [n for n in (facts.base_llm, facts.teacher, facts.encoder) if n]
    inherited = before.get("licences", {})
    known = {name: licence for name, licence in inherited.items() if is_hub_id(name)}  # a folder may be another one
    known |= {published(name): licence for name, licence in facts.licences.items()}
    found = {published(name): _licence(str(name)) for name in names if published(name) not in known}
    encoder = published(facts.encoder) if facts.encoder else before.get("encoder")
    return {
        "base_llm": published(facts.base_llm) if facts.base_llm else before.get("base_llm", "not stated"),
        "teacher": published(facts.teacher) if facts.teacher else before.get("teacher", no_teacher),
        **({"encoder": encoder} if encoder else {}),
        "licences": inherited | known | found,
        "stages": [*before.get("stages", []), {key: value for key, value in stage.items() if value is not None}],
    }


def _licence(name: str) -> str:
    """A licence that is known here: of a common name, or from the card in a folder or among the files fetched;
    `other (NAME)` where it is one of its own."""
    if published(name) in KNOWN_LICENCES:
        return KNOWN_LICENCES[published(name)]
    front = card.data.to_dict() if (card := _card(name)) else {}
    licence, own = front.get("license"), front.get("license_name")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    return f"other ({own})" if licence == "other" and own else str(licence or NOT_STATED)


def _card(name: str) -> ModelCard | None:
    """The card of a folder, or of what was fetched under a hub id."""
    with suppress(Exception):  # no such page, or no valid front matter
        page = os.path.join(name, "README.md") if os.path.isdir(name) else try_to_load_from_cache(name, "README.md")
        return ModelCard(Path(str(page)).read_text(encoding="utf-8-sig"), ignore_metadata_errors=True)
    return None
