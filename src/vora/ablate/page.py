"""The table as Markdown."""

from typing import Any

from vora.report.markdown import table


def markdown(found: dict[str, Any]) -> str:
    """The page of what table.json holds."""
    variants = found["variants"]
    metrics = list(dict.fromkeys(name for row in variants for name in row["metrics"]))
    has_teacher = any(row["distill_loss"]["mean"] is not None for row in variants)
    columns = ["variant", "seeds", "lm_loss", "against baseline", "samples to the baseline's loss"]
    columns += ["distill_loss"] * has_teacher
    for name in metrics:
        columns += [name, "against baseline"]
    columns += ["samples", "images alone", "tokens", "seconds"]
    lines = []
    for row in variants:
        is_baseline = row["variant"] == found["baseline"]
        cells = [row["variant"] + " (baseline)" * is_baseline, str(len(row["lm_loss"]["by_seed"]))]
        cells += [_figure(row["lm_loss"]), _figure(row["difference"].get("lm_loss"), "+.4f")]
        cells += [_figure(row["to_baseline"]["samples"], ",.0f") if is_baseline else _needed(row["to_baseline"])]
        cells += [_figure(row["distill_loss"])] * has_teacher
        for name in metrics:
            cells += [_figure(row["metrics"].get(name)), _figure(row["difference"].get(name), "+.4f")]
        counts = ("samples_seen", "distill_only", "tokens", "seconds")
        lines.append(cells + [_figure({**row[name], "half": None}, ",.0f") for name in counts])
    warnings = "".join(f"* **{text}**\n" for text in found["warnings"])
    failed = "".join(f"* {row['variant']}, seed {n}: {why}\n" for row in variants for n, why in row["failed"].items())
    overrides = "".join(f"* {row['variant']}: `{' '.join(row['overrides']) or 'the recipe'}`\n" for row in variants)
    changed = " (with changes since)" if found["commit_is_changed"] else ""
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

{overrides}
Made by `{found["command"]}` at commit {found["commit"] or "unknown"}{changed}; trained at \
{", ".join(found["trained_at"]) or "unknown"}.
"""


def _figure(found: dict[str, Any] | None, form: str = ".4f") -> str:
    """A mean over seeds, with half of its interval where there is one."""
    if found is None or found["mean"] is None:
        return "-"
    return f"{found['mean']:{form}}" + ("" if found["half"] is None else f" ± {found['half']:{form.lstrip('+')}}")


def _needed(found: dict[str, Any]) -> str:
    """When a variant is at the baseline's loss."""
    if missed := found["seeds_not_reached"]:
        return f"not reached by {len(missed)} of {len(missed) + len(found['samples']['by_seed'])}"
    share = found["fewer_share"]
    if share["mean"] is None:
        return "-"
    half = "" if share["half"] is None else f" ± {100 * share['half']:.0f}"
    word = "fewer" if share["mean"] >= 0 else "more"
    return f"{found['samples']['mean']:,.0f} ({100 * abs(share['mean']):.0f}{half} % {word})"
