"""What a grid says: each arm over its seeds, and against the baseline seed by seed."""

import math
from statistics import fmean, stdev

from vora.ablate.curves import samples_until

T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t at 97.5 %, 1 to 9 degrees
UNEQUAL = 0.05  # arms whose samples differ by more are no fair comparison


def over_seeds(by_seed):
    """{"mean", "half", "by_seed"}: the mean, and half the width of its 95 % interval (Student's t); None with fewer
    than two seeds. More than ten seeds are given the t of ten, which is a little too wide."""
    values = list(by_seed.values())
    if not values:
        return {"mean": None, "half": None, "by_seed": {}}
    half = None
    if len(values) > 1:
        half = T95[min(len(values) - 1, len(T95)) - 1] * stdev(values) / math.sqrt(len(values))
    return {"mean": fmean(values), "half": half, "by_seed": {str(seed): value for seed, value in by_seed.items()}}


def summary(arms, baseline, curves, scores, failures):
    """All figures of a table.

    Args:
        arms: {arm: overrides}.
        curves: {(arm, seed): Curve}.
        scores: {(arm, seed): {metric: value}}.
        failures: {(arm, seed): cause}.

    Returns:
        dict: `arms`, a list of what is known of each, and `warnings`, what keeps it from being a fair comparison.
    """
    rows = [_row(arm, overrides, baseline, curves, scores, failures) for arm, overrides in arms.items()]
    return {"arms": rows, "warnings": _warnings(rows)}


def _row(arm, overrides, baseline, curves, scores, failures):
    own = {seed: curve for (name, seed), curve in curves.items() if name == arm}
    theirs = {seed: curve for (name, seed), curve in curves.items() if name == baseline}
    figures = {
        "lm_loss": {seed: curve.final for seed, curve in own.items()},
        "distill_loss": {s: float(c.distill_loss) for s, c in own.items() if c.distill_loss is not None},
        **{name: {seed: getattr(curve, name) for seed, curve in own.items()}
           for name in ("samples_seen", "pictures_alone", "tokens", "seconds")},
    }  # fmt: skip
    measured = _by_metric(scores, arm)
    differences, compared = {}, {"lm_loss": {s: c.final for s, c in theirs.items()}, **_by_metric(scores, baseline)}
    if arm != baseline:
        for name, values in {"lm_loss": figures["lm_loss"], **measured}.items():
            paired = {s: v - compared[name][s] for s, v in values.items() if s in compared.get(name, {})}
            differences[name] = over_seeds(paired)
    return {
        "arm": arm,
        "overrides": overrides,
        "failed": {str(seed): cause for (name, seed), cause in failures.items() if name == arm},
        **{name: over_seeds(values) for name, values in figures.items()},
        "metrics": {name: over_seeds(values) for name, values in measured.items()},
        "difference": differences,
        "to_baseline": _to_baseline(own, theirs),
    }


def _by_metric(scores, arm):
    found = {}
    for (name, seed), values in scores.items():
        if name == arm:
            for metric, value in values.items():
                if value is not None:
                    found.setdefault(metric, {})[seed] = value
    return found


def _to_baseline(own, theirs):
    """After how many samples an arm is at the loss that the baseline of the same seed ends with.

    The baseline's own number is read off its curve in the same way, for it may be there before its end.
    """
    samples, fewer, missed = {}, {}, []
    for seed in own.keys() & theirs.keys():
        needed, least = (samples_until(curve, theirs[seed].final) for curve in (own[seed], theirs[seed]))
        if needed is None:
            missed.append(seed)
        else:
            samples[seed], fewer[seed] = needed, 1 - needed / least
    return {"samples": over_seeds(samples), "fewer_share": over_seeds(fewer), "seeds_not_reached": sorted(missed)}


def _warnings(rows):
    warnings, ran = [], [row for row in rows if row["samples_seen"]["mean"]]
    for name, what in (("samples_seen", "samples"), ("tokens", "tokens, padding included")):
        means = {row["arm"]: row[name]["mean"] for row in ran}
        if means and max(means.values()) > (1 + UNEQUAL) * min(means.values()):
            told = ", ".join(f"{arm} {value:,.0f}" for arm, value in means.items())
            cure = ": no fair comparison of final losses; set `samples`" if name == "samples_seen" else ""
            warnings.append(f"Arms ended with unequal {what} ({told}){cure}.")
    alone = {row["arm"]: row["pictures_alone"]["mean"] for row in ran}
    if alone and max(alone.values()) > (1 + UNEQUAL) * min(alone.values()):
        told = ", ".join(f"{arm} {value:,.0f}" for arm, value in alone.items())
        warnings.append(f"Of their samples, arms saw unequally many as pictures alone ({told}); these count as seen.")
    sets = {tuple(row["lm_loss"]["by_seed"]) for row in rows}
    if len(sets) > 1:
        told = ", ".join(f"{row['arm']} {len(row['lm_loss']['by_seed'])}" for row in rows)
        warnings.append(f"Not all arms have the same finished seeds (finished: {told}).")
    return warnings
