"""What a grid says: each variant over its seeds, and against the baseline seed by seed."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, TypedDict

from vora.ablate.curves import Curve, samples_until

Key = tuple[str, int]  # variant and seed
Scores = Mapping[Key, Mapping[str, float | None]]

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t at 97.5 %, 1 to 9 degrees
UNEQUAL = 0.05  # variants whose samples differ by more are no fair comparison


class OverSeeds(TypedDict):
    """A mean over seeds, and half the width of its 95 % interval; None where there are too few."""

    mean: float | None
    half: float | None
    by_seed: dict[str, float]


def over_seeds(by_seed: Mapping[int, float]) -> OverSeeds:
    """The mean with its interval by Student's t; more than ten seeds are given that of ten, a little too wide."""
    values = list(by_seed.values())
    if not values:
        return {"mean": None, "half": None, "by_seed": {}}
    half = None
    if len(values) > 1:
        half = T95[min(len(values) - 1, len(T95)) - 1] * stdev(values) / math.sqrt(len(values))
    return {"mean": fmean(values), "half": half, "by_seed": {str(seed): value for seed, value in by_seed.items()}}


def summary(
    variants: Mapping[str, Sequence[str]],
    baseline: str,
    curves: Mapping[Key, Curve],
    scores: Scores,
    failures: Mapping[Key, str],
) -> dict[str, Any]:
    """All figures of a table.

    Args:
        variants: {variant: overrides}.
        scores: {(variant, seed): {metric: value}}.
        failures: {(variant, seed): cause}.

    Returns:
        dict: `variants`, a list of what is known of each, and `warnings`, what keeps it from being a fair comparison.
    """
    rows = [_row(variant, overrides, baseline, curves, scores, failures) for variant, overrides in variants.items()]
    return {"variants": rows, "warnings": _warnings(rows)}


def _row(
    variant: str,
    overrides: Sequence[str],
    baseline: str,
    curves: Mapping[Key, Curve],
    scores: Scores,
    failures: Mapping[Key, str],
) -> dict[str, Any]:
    own = {seed: curve for (name, seed), curve in curves.items() if name == variant}
    theirs = {seed: curve for (name, seed), curve in curves.items() if name == baseline}
    figures: dict[str, dict[int, float]] = {
        "lm_loss": {seed: curve.final for seed, curve in own.items()},
        "distill_loss": {s: float(c.distill_loss) for s, c in own.items() if c.distill_loss is not None},
        **{name: {seed: getattr(curve, name) for seed, curve in own.items()}
           for name in ("samples_seen", "distill_only", "tokens", "seconds")},
    }  # fmt: skip
    measured = _by_metric(scores, variant)
    differences, compared = {}, {"lm_loss": {s: c.final for s, c in theirs.items()}, **_by_metric(scores, baseline)}
    if variant != baseline:
        for name, values in {"lm_loss": figures["lm_loss"], **measured}.items():
            paired = {s: v - compared[name][s] for s, v in values.items() if s in compared.get(name, {})}
            differences[name] = over_seeds(paired)
    return {
        "variant": variant,
        "overrides": overrides,
        "failed": {str(seed): cause for (name, seed), cause in failures.items() if name == variant},
        **{name: over_seeds(values) for name, values in figures.items()},
        "metrics": {name: over_seeds(values) for name, values in measured.items()},
        "difference": differences,
        "to_baseline": _to_baseline(own, theirs),
    }


def _by_metric(scores: Scores, variant: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for (name, seed), values in scores.items():
        if name == variant:
            for metric, value in values.items():
                if value is not None:
                    found.setdefault(metric, {})[seed] = value
    return found


def _to_baseline(own: Mapping[int, Curve], theirs: Mapping[int, Curve]) -> dict[str, Any]:
    """After how many samples a variant is at the loss that the baseline of the same seed ends with.

    The baseline's own number is read off its curve in the same way, for it may be there before its end.
    """
    samples: dict[int, float] = {}
    fewer: dict[int, float] = {}
    missed: list[int] = []
    for seed in own.keys() & theirs.keys():
        needed, least = (samples_until(curve, theirs[seed].final) for curve in (own[seed], theirs[seed]))
        if needed is None or least is None:
            missed.append(seed)
        else:
            samples[seed], fewer[seed] = needed, 1 - needed / least
    return {"samples": over_seeds(samples), "fewer_share": over_seeds(fewer), "seeds_not_reached": sorted(missed)}


def _warnings(rows: Sequence[dict[str, Any]]) -> list[str]:
    warnings, ran = [], [row for row in rows if row["samples_seen"]["mean"]]
    for name, what in (("samples_seen", "samples"), ("tokens", "tokens, padding included")):
        means = {row["variant"]: row[name]["mean"] for row in ran}
        if means and max(means.values()) > (1 + UNEQUAL) * min(means.values()):
            counts = ", ".join(f"{variant} {value:,.0f}" for variant, value in means.items())
            cure = ": no fair comparison of final losses; set `samples`" if name == "samples_seen" else ""
            warnings.append(f"Variants ended with unequal {what} ({counts}){cure}.")
    alone = {row["variant"]: row["distill_only"]["mean"] for row in ran}
    if alone and max(alone.values()) > (1 + UNEQUAL) * min(alone.values()):
        counts = ", ".join(f"{variant} {value:,.0f}" for variant, value in alone.items())
        warnings.append(f"Of their samples, variants saw unequally many without text ({counts}); these count as seen.")
    sets = {tuple(row["lm_loss"]["by_seed"]) for row in rows}
    if len(sets) > 1:
        counts = ", ".join(f"{row['variant']} {len(row['lm_loss']['by_seed'])}" for row in rows)
        warnings.append(f"Not all variants have the same finished seeds (finished: {counts}).")
    return warnings
