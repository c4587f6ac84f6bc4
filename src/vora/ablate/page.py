"""The table as Markdown."""

from typing import Any

from vora.report.markdown import table


def markdown(found: dict[str, Any]) -> str:
    """The page of a grid.

    Args:
        found: what table.json holds.
    """
    metrics = list(dict.fromkeys(name for row in found["variants"] for name in row["metrics"]))
    has_teacher = any(row["distill_loss"]["mean"] is not None for row in found["variants"])
    columns = ["variant", "seeds", "lm_loss", "against baseline", "samples to the baseline's loss"]
    columns += ["distill_loss"] * has_teacher
    for name in metrics:
        columns += [name, "against baseline"]
    columns += ["samples", "images alone", "tokens", "seconds"]
    lines = []
    for row in found["variants"]:
        is_baseline = row["variant"] == found["baseline"]
        cells = [row["variant"] + " (baseline)" * is_baseline, str(len(row["lm_loss"]["by_seed"]))]
        cells += [_figure(row["lm_loss"]), _difference(row, "lm_loss"), _needed(row, is_baseline)]
        cells += [_figure(row["distill_loss"])] * has_teacher
        for name in metrics:
            cells += [_figure(row["metrics"].get(name)), _difference(row, name)]
        cells += [_count(row[name]) for name in ("samples_seen", "distill_only", "tokens", "seconds")]
        lines.append(cells)
    warnings = "".join(f"* **{text}**\n" for text in found["warnings"])
    failed = "".join(
        f"* {row['variant']}, seed {seed}: {cause}\n"
        for row in found["variants"]
        for seed, cause in row["failed"].items()
    )
    variants = "".join(
        f"* {row['variant']}: `{' '.join(row['overrides']) or 'the recipe'}`\n" for row in found["variants"]
    )
    changed = " (with changes since)" if found["commit_is_changed"] else ""
    trained = ", ".join(found["trained_at"]) or "unknown"
    return f"""# {found["name"]}

{table(columns, lines, "lr")}

![lm_loss against samples seen](curves.png)

{warnings + chr(10) if warnings else ""}{"Failed:" + chr(10) * 2 + failed + chr(10) if failed else ""}\
`±` is half of a 95 % interval over seeds (Student's t; none with a single seed); differences are paired by seed. An
interval that holds 0 shows no difference. lm_loss is that of training, on samples as they come, a mean over the last
{found["window"]:.0%} of samples; curves are such running means. "Samples to the baseline's loss": where a variant's
curve is first as low as the baseline's of the same seed at its end. distill_loss compares only variants with the same
teacher, pairs and targets. Seconds are of steps, on the machine at hand, without loading and measuring.

Variants, all with `{" ".join(found["set"]) or "the recipe as it is"}`, seeds {", ".join(map(str, found["seeds"]))}:

{variants}
Made by `{found["command"]}` at commit {found["commit"] or "unknown"}{changed}; trained at {trained}.
"""


def _figure(found: dict[str, Any] | None) -> str:
    if found is None or found["mean"] is None:
        return "-"
    return f"{found['mean']:.4f}" + ("" if found["half"] is None else f" ± {found['half']:.4f}")


def _difference(row: dict[str, Any], name: str) -> str:
    found = row["difference"].get(name)
    if found is None or found["mean"] is None:
        return "-"
    return f"{found['mean']:+.4f}" + ("" if found["half"] is None else f" ± {found['half']:.4f}")


def _needed(row: dict[str, Any], is_baseline: bool) -> str:
    found = row["to_baseline"]
    if is_baseline:
        return _count(found["samples"])
    if missed := found["seeds_not_reached"]:
        return f"not reached by {len(missed)} of {len(missed) + len(found['samples']['by_seed'])}"
    share = found["fewer_share"]
    if share["mean"] is None:
        return "-"
    half = "" if share["half"] is None else f" ± {100 * share['half']:.0f}"
    word = "fewer" if share["mean"] >= 0 else "more"
    return f"{found['samples']['mean']:,.0f} ({100 * abs(share['mean']):.0f}{half} % {word})"


def _count(found: dict[str, Any]) -> str:
    return "-" if found["mean"] is None else f"{found['mean']:,.0f}"
