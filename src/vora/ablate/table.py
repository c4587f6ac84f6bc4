"""What a grid says: each variant over its seeds, and against the baseline seed by seed."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypeVar

from vora.ablate.curves import Curve, samples_until

Value = TypeVar("Value")
Key = tuple[str, int]  # variant and seed
Scores = Mapping[Key, Mapping[str, float | None]]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t at 97.5 %, 1 to 9 degrees
UNEQUAL = 0.05  # variants whose samples differ by more are no fair comparison


def over_seeds(by_seed: Mapping[int, float]) -> dict[str, Any]:
    """The mean over seeds, and half the width of its 95 % interval by Student's t (more than ten seeds are given that
    of ten, a little too wide); None where there are too few."""
    values, half = list(by_seed.values()), None
    if len(values) > 1:
        half = T95[min(len(values) - 1, len(T95)) - 1] * stdev(values) / math.sqrt(len(values))
    seeds = {str(seed): value for seed, value in by_seed.items()}
    return {"mean": fmean(values) if values else None, "half": half, "by_seed": seeds}


def summary(
    variants: Mapping[str, Sequence[str]], baseline: str, curves: Mapping[Key, Curve], scores: Scores,
    failures: Mapping[Key, str],
) -> dict[str, Any]:  # fmt: skip
    """All figures of a table: `loss`, the name of what the curves are of, `variants`, a list of what is known of each,
    and `warnings`, what keeps it from being a fair comparison. Given are {variant: overrides}, and of runs their
    curves, all of one loss, {metric: value} and causes of failure.
    """
    loss = next((curve.loss for curve in curves.values()), "lm_loss")
    theirs, compared = _of(curves, baseline), _compared_figures(curves, scores, baseline, loss)
    rows = []
    for variant, overrides in variants.items():
        own, figures = _of(curves, variant), _compared_figures(curves, scores, variant, loss)
        differences = {}
        for name, values in figures.items():
            base = compared.get(name, {})
            differences[name] = over_seeds({one: values[one] - base[one] for one in values if one in base})
        row = {
            "variant": variant,
            "overrides": overrides,
            "failed": {str(seed): cause for seed, cause in _of(failures, variant).items()},
            "distill_loss": over_seeds({s: c.distill_loss for s, c in own.items() if c.distill_loss is not None}),
            loss: over_seeds(figures.pop(loss)),
        }
        for name in ("samples_seen", "distill_only", "tokens", "seconds"):
            row[name] = over_seeds({seed: getattr(curve, name) for seed, curve in own.items()})
        row["metrics"] = {name: over_seeds(values) for name, values in figures.items()}
        row |= {"difference": {} if variant == baseline else differences, "to_baseline": _to_baseline(own, theirs)}
        rows.append(row)
    return {"loss": loss, "variants": rows, "warnings": _warnings(rows, loss)}


def _of(values: Mapping[Key, Value], variant: str) -> dict[int, Value]:
    return {seed: value for (name, seed), value in values.items() if name == variant}


def _compared_figures(
    curves: Mapping[Key, Curve], scores: Scores, variant: str, loss: str
) -> dict[str, dict[int, float]]:
    """{the loss, and each metric: {seed: value}}."""
    found = {loss: {seed: curve.final for seed, curve in _of(curves, variant).items()}}
    for seed, values in _of(scores, variant).items():
        for metric, value in values.items():
            if value is not None:
                found.setdefault(metric, {})[seed] = value
    return found


def _to_baseline(own: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> dict[str, Any]:
    """After how many samples a variant is at the loss that the baseline of the same seed ends with; the baseline's own
    number is read off its curve in the same way, for it may be there before its end."""
    samples, fewer, missed = {}, {}, []
    for seed in sorted(own.keys() & theirs.keys()):
        needed, least = (samples_until(curve, theirs[seed].final) for curve in (own[seed], theirs[seed]))
        if needed is None or least is None:
            missed.append(seed)
        else:
            samples[seed], fewer[seed] = needed, 1 - needed / least
    return {"samples": over_seeds(samples), "fewer_share": over_seeds(fewer), "seeds_not_reached": missed}


def unequal_models(num_trained: Mapping[str, int]) -> list[str]:
    """A warning where variants train unequal numbers of parameters, so that more than the overrides' names differs."""
    known = {variant: count for variant, count in num_trained.items() if count}
    if not known or max(known.values()) <= (1 + UNEQUAL) * min(known.values()):
        return []
    counts = ", ".join(f"{variant} {count:,}" for variant, count in known.items())
    return [
        f"Variants train unequal numbers of parameters ({counts}): their models differ, too, as without a teacher the "
        "patch embedding does."
    ]


def _warnings(rows: Sequence[dict[str, Any]], loss: str) -> list[str]:
    warnings = []
    for name, what, effect in (
        ("samples_seen", "samples", ": no fair comparison of final losses; set `samples`"),
        ("tokens", "tokens, padding included", ""),
        ("distill_only", "samples without text", ", which count as seen"),
    ):
        means = {row["variant"]: row[name]["mean"] for row in rows if row["samples_seen"]["mean"]}
        if means and max(means.values()) > (1 + UNEQUAL) * min(means.values()):
            counts = ", ".join(f"{variant} {value:,.0f}" for variant, value in means.items())
            warnings.append(f"Variants ended with unequal {what} ({counts}){effect}.")
    if len({tuple(row[loss]["by_seed"]) for row in rows}) > 1:
        counts = ", ".join(f"{row['variant']} {len(row[loss]['by_seed'])}" for row in rows)
        warnings.append(f"Not all variants have the same finished seeds (finished: {counts}).")
    return warnings
