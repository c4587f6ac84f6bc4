"""The specification of an ablation: strict YAML, as a recipe, that names variants, seeds and what to measure."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from vora.eval.evaluation import Evaluation
from vora.eval.rows import Data, Rows
from vora.eval.run import evaluation_of
from vora.eval.tasks.evaluation import task_of
from vora.train.from_recipe import check_recipe
from vora.train.recipe import Recipe, Section, load_recipe, read_yaml, validated

VARIANT = r"\w[\w=.,+-]*"  # a variant's name is also its folder's


class EvaluateSection(Section):
    """One measurement of each variant's merged model, with the words of `vora eval`."""

    name: str = Field("", pattern=r"^(\w[\w=,+-]*)?$")  # of its columns in the table; default: the task's
    task: str
    metrics: list[str] | None = Field(None, min_length=1)  # the table's columns; default: all that it reports
    of: str | None = None  # the task that is probed; default: the one that the data's columns fit
    against: list[str] | None = None  # of a probe; default: other
    generate: bool | None = None  # of a probe: let the model speak too
    base: str | None = None  # of text: the LLM to compare with; default: the recipe's model.llm
    data: str | list[str] | None = None  # start in the recipe's data.folder, else beside the specification
    prompt: str | None = None
    labels: list[str] | None = None
    columns: dict[str, str] | None = None
    split: str | None = None
    subset: str | None = None
    image_folder: str | None = None
    allow_urls: bool = False
    held_out: bool | None = None  # only what data.validation.share holds out; without data, of the recipe's source
    max_samples: int | None = Field(None, ge=1)
    seed: int = 0

    @model_validator(mode="after")
    def is_possible(self) -> "EvaluateSection":
        self.name = self.name or self.task
        if self.data is None and not self.held_out:
            raise ValueError("say data, what it is measured on, or held_out: true, what the recipe holds out")
        self.evaluation()
        return self

    def evaluation(self, base: str | None = None, data: Data | None = None) -> Evaluation:
        """What is to be measured, of data that is there or, to see whether it is possible, of any; `base` as of
        `evaluation_of`."""
        options = self.model_dump(include={"of", "against", "base", "prompt", "labels", "max_samples", "seed"})
        if self.task == "probe":
            options["against"] = self.against or ["other"]
            options["of"] = self.of or ("captions" if data is None else task_of(Rows(data)))
        return evaluation_of(self.task, **options | {"generate": bool(self.generate), "base": base or self.base})


class Spec(Section):
    """Variants are lists of overrides of one recipe, or a `grid` of values, each combination of which is a variant."""

    recipe: str  # beside the specification
    set: list[str] = []  # overrides that all variants share
    variants: dict[str, list[str]] | None = Field(None, min_length=1)
    grid: dict[str, list[Any]] | None = Field(None, min_length=1)
    seeds: list[int] = Field([0], min_length=1)
    samples: int | None = Field(None, ge=1)  # each run ends at the first log line with so many; see `EnoughSamples`
    baseline: str | None = None  # the variant that the others are compared with; default: the first
    evaluate: list[EvaluateSection] = []
    window: float = Field(0.1, gt=0, le=1)  # losses are means over this share of all samples

    @field_validator("set", "variants")
    @classmethod
    def are_overrides(cls, value: dict[str, list[str]] | list[str] | None) -> dict[str, list[str]] | list[str] | None:
        for override in sum(value.values(), []) if isinstance(value, dict) else value or ():
            if "=" not in override:
                raise ValueError(f"{override!r} is no override: write key=value, such as lora.rank=16")
            if override.partition("=")[0] in ("training.seed", "max_minutes"):
                raise ValueError(f"{override!r}: seeds stand under seeds, and all variants run as long; leave it out")
        return value

    @model_validator(mode="after")
    def sensible(self) -> "Spec":
        if (self.variants is None) == (self.grid is None):
            raise ValueError("give exactly one of variants ({name: [overrides]}) and grid ({key: [values]})")
        if self.variants is None:
            self.variants = _combinations(self.grid or {})
        for name in self.variants:
            if not re.fullmatch(VARIANT, name):
                raise ValueError(f"{name!r} is no name for a variant: letters, digits and = . , + - _ make a folder")
        self.baseline = self.baseline or next(iter(self.variants))
        if self.baseline not in self.variants:
            raise ValueError(f"baseline {self.baseline!r} is no variant: choose among {', '.join(self.variants)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {self.seeds} name one twice: it would count twice")
        names = [section.name for section in self.evaluate]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluate has two entries called {max(names, key=names.count)!r}: give each a name")
        return self


@dataclass
class Run:
    """One run: a variant with a seed."""

    variant: str
    seed: int
    recipe: Recipe
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant}/seed-{self.seed}"

    @property
    def is_finished(self) -> bool:
        """Whether its training has ended."""
        return (self.folder / "run.json").exists()


def load_spec(path: str | Path) -> Spec:
    """Read a specification, whose recipe lies beside it; ValueError names all that is wrong in one message."""
    path = Path(path)
    values = read_yaml(path)
    if "recipe" not in values and "model" in values:
        raise ValueError(
            f"{path} is a recipe, and no specification: write a file with recipe: {path.name} and variants: {{NAME: "
            "[KEY=VALUE]}, and name that."
        )
    spec = validated(Spec, values, str(path))
    spec.recipe = str(path.parent / spec.recipe)
    return spec


def chosen_of(
    spec: Spec, seeds: Sequence[str] | None, variants: Sequence[str] | None, max_samples: int | None
) -> Spec:
    """A part of a specification: these seeds and variants (of which the first is the baseline where the baseline is
    not among them), trained and measured on so many samples at most. ValueError where there is no such one."""
    changes: dict[str, Any] = {}
    if seeds is not None:
        if not seeds or not all(re.fullmatch(r"\d+", seed) for seed in seeds):
            raise ValueError(f"--seeds {','.join(seeds)} are no whole numbers: say --seeds 0,1,2.")
        changes["seeds"] = [int(seed) for seed in dict.fromkeys(seeds)]
    if variants is not None:
        known = spec.variants or {}
        if unknown := [name for name in variants if name not in known] or ["nothing"] * (not variants):
            raise ValueError(f"--variants names {unknown[0]}, and there are {', '.join(known)}.")
        changes["variants"] = {name: own for name, own in known.items() if name in variants}
        changes["baseline"] = spec.baseline if spec.baseline in variants else next(iter(changes["variants"]))
    if max_samples is not None:
        changes["samples"] = min(max_samples, spec.samples or max_samples)
        changes["evaluate"] = [
            one.model_copy(update={"max_samples": min(max_samples, one.max_samples or max_samples)})
            for one in spec.evaluate
        ]
    return spec.model_copy(update=changes)


def runs_of(spec: Spec, overrides: Sequence[str], out: str | Path) -> list[Run]:
    """All runs of a specification with their recipes, seed by seed: a stopped grid still compares its variants.

    A variant's own overrides go over `overrides`, which are of the command line. ValueError names a variant whose
    recipe is bad, or plans its steps by the clock.
    """
    runs = []
    for seed, (variant, own) in product(spec.seeds, (spec.variants or {}).items()):
        try:
            recipe = load_recipe(Path(spec.recipe), [*spec.set, *overrides, *own, f"training.seed={seed}"])
            check_recipe(recipe)
            if recipe.max_minutes is not None:
                raise ValueError(
                    "max_minutes plans steps by the clock, so that variants would see unequal samples: leave it out "
                    "and say training.max_steps, or samples in the specification."
                )
        except ValueError as error:
            raise ValueError(f"variant {variant}: {error}") from None
        runs.append(Run(variant, seed, recipe, Path(out) / variant / f"seed-{seed}"))
    return runs


def _combinations(grid: dict[str, list[Any]]) -> dict[str, list[str]]:
    """The variants of a grid: names, from the last parts of the keys, and overrides."""
    axes = []
    for key, values in grid.items():
        texts = [value if isinstance(value, str) else json.dumps(value) for value in values]
        if not texts or len(set(texts)) < len(texts):
            raise ValueError(f"grid.{key} has {'a value twice' if texts else 'no values'}: {values}")
        axes.append([f"{key}={text}" for text in texts])
    names = {one: one[one.rfind(".", 0, one.index("=")) + 1 :] for axis in axes for one in axis}
    return {",".join(names[one] for one in own): list(own) for own in product(*axes)}
