"""The model card: README.md of a saved model, filled into `card.md.j2`; of a path only its last part is named."""

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import Environment, StrictUndefined

from vora.checkpoint.layout import Kind, read_info
from vora.checkpoint.lineage import NOT_STATED, lineage, read_card
from vora.checkpoint.names import command_without_folders, is_hub_id
from vora.checkpoint.run_directory import last_step, read_lines, read_recipe, run_of, weights_of_run

# (task, metric, value, number of examples, the command that makes it again)
Evaluation = tuple[str, str, float | str, int, str]


@dataclass(frozen=True)
class CardFacts:
    """What is known of a saved model; what is left out is said to be not stated, and never guessed. LLM, teacher and
    encoder are aliases, hub ids or folders; by default those of `source`'s card."""

    made: Literal["trained", "merged", "imported", "folded"]
    stage: str
    base_llm: str | None = None
    teacher: str | None = None
    encoder: str | None = None
    source: str | None = None  # folder or hub id of what this one went on from, or was imported from
    data: Sequence[tuple[str, float | None]] = ()  # (name, weight); None where rows count alike
    recipe: dict[str, Any] | None = None
    steps: int | None = None
    samples_seen: int | None = None
    losses: dict[str, float] = field(default_factory=dict)  # the last ones
    logged_step: int | None = None  # at which samples and losses were noted
    evaluation: Sequence[Evaluation] = ()
    licences: dict[str, str] = field(default_factory=dict)  # of LLM, teacher and data, where known
    merge_command: str = "vora merge RUN -o my-vora"  # of a folder with unmerged vision LoRA


@contextmanager
def _harmless() -> Iterator[None]:
    """A card that cannot be written costs a warning, never the model that has just been saved."""
    try:
        yield
    except Exception as error:  # whatever it is, the weights matter more
        cause = f"{type(error).__name__}: {error}"
        logging.getLogger(__name__).warning("The model is saved, but without a card: %s", cause)


@_harmless()
def write_card(folder: Path | str, facts: CardFacts) -> Path | None:
    """Write README.md into a folder in which a model has just been saved; its path, or None if that failed."""
    record, kind, card = lineage(facts), read_info(folder).kind, Path(folder) / "README.md"
    encoder, recipes = record.get("encoder"), [stage.get("recipe") for stage in record["stages"]]
    texts = [None if recipe is None else _yaml(recipe) for recipe in recipes]
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["without_folders"] = command_without_folders
    environment.filters["quoted"] = lambda name: name if name in ("none", "not stated") else f"`{name}`"
    template = environment.from_string((files("vora.checkpoint") / "card.md.j2").read_text(encoding="utf-8"))
    text = template.render(
        record,
        front=_yaml(_front_matter(record, kind)),
        kind=kind,
        facts=facts,
        encoder=encoder,
        not_stated=NOT_STATED,
        parts=[("base LLM", record["base_llm"]), ("teacher", record["teacher"]), ("encoder", encoder)]
        + [("data", name) for name in _data_of(record)],
        starts_as_teacher=any(
            (r.get("teacher") or {}).get("init_from_teacher") and r["model"]["llm"] for r in recipes if r
        ),
        recipes=texts,
        # longer than any fence within; `read_card` finds them again
        fences=["`" * max(3, 1 + max(map(len, re.findall("`+", text or "")), default=0)) for text in texts],
    )
    card.write_text(text, encoding="utf-8")
    return card


@_harmless()
def write_run_card(
    folder: Path | str, source: Path | str, steps: int | None = None, evaluation: Sequence[Evaluation] = (),
    merge_command: str = CardFacts.merge_command,
) -> Path | None:  # fmt: skip
    """Write the card of a model that comes from a run, or from an unmerged model or adapter. A run that has only just
    ended is told how many steps it took; otherwise what it saved says so."""
    run = run_of(Path(source))
    if run is None:  # imported or received, and merged now: what is known stands on its own card
        return write_card(folder, CardFacts(made="folded", stage="pretrain", source=str(source)))
    recipe = read_recipe(run)
    saved = weights_of_run(run) if run == Path(source) else Path(source)
    model, teacher = recipe["model"], recipe.get("teacher") or {}
    # what was noted when the run ended, where its data lay
    before = (read_card(saved) if steps is None else None) or {}
    noted = before.get("stages", [{}])[-1]
    if steps is None:
        steps = noted.get("steps") or (
            last_step(saved) if saved.name != "final" else recipe["training"].get("max_steps")
        )
    data = noted.get("data") or [{"name": s["path"], "weight": s.get("weight")} for s in recipe["data"]["sources"]]
    lines = read_lines(run / "log.jsonl")
    logged: dict[str, Any] = next((line for line in reversed(lines) if steps is None or line["step"] <= steps), {})
    is_merged = recipe["stage"] == "pretrain" and not (Path(folder) / "adapter_config.json").exists()
    facts = CardFacts(
        made="merged" if is_merged else "trained",
        stage=recipe["stage"],
        base_llm=_first_llm(model),
        teacher=teacher.get("name"),
        encoder=model.get("encoder"),
        source=model.get("vora") and str(read_info(model["vora"]).path),
        data=[(one["name"], one["weight"]) for one in data],
        recipe=noted.get("recipe") or recipe,
        steps=steps,
        samples_seen=logged.get("samples_seen"),
        losses={name: value for name, value in logged.items() if name.endswith("_loss")},
        logged_step=logged.get("step"),
        evaluation=evaluation,
        merge_command=merge_command,
        licences={name: known for name, known in before.get("licences", {}).items() if known != NOT_STATED},
    )
    return write_card(folder, facts)


def _first_llm(model: dict[str, Any]) -> str | None:
    """The LLM that a chain of runs began with, or None if that is not known here."""
    while model.get("llm") is None and (run := run_of(Path(model["vora"]))) is not None:
        model = read_recipe(run)["model"]
    return model.get("llm")


def _front_matter(record: dict[str, Any], kind: Kind) -> dict[str, Any]:
    licence = record["licences"].get(record["base_llm"], NOT_STATED)
    front: dict[str, Any] = {"license": licence if re.fullmatch(r"[\w.-]+", licence) else "other"}
    if own := re.fullmatch(r"other \((.+)\)", licence):
        front["license_name"] = own.group(1)
    if is_hub_id(record["base_llm"]):
        front["base_model"] = record["base_llm"]
    front["pipeline_tag"] = "text-generation" if kind == "llm" else "image-text-to-text"
    front["library_name"] = "transformers"
    front["tags"] = ["vora", "llava" if "encoder" in record else "vision-as-lora"]
    front["tags"] += ["lora"] if kind in ("adapter", "unmerged") else []
    if found := [name for name in _data_of(record) if is_hub_id(name)]:
        front["datasets"] = found
    stages = [{key: value for key, value in stage.items() if key != "recipe"} for stage in record["stages"]]
    return front | {"vora": record | {"stages": stages}}


def _data_of(record: dict[str, Any]) -> dict[str, None]:
    return dict.fromkeys(source["name"] for stage in record["stages"] for source in stage["data"])


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)
