"""The table as Markdown."""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, Literal

from rich.table import Table

from vora.eval.report import commit_in_words
from vora.report.markdown import table
from vora.train.validation import LOOKS

COUNTS = {"samples_seen": "samples", "distill_only": "images alone", "tokens": "tokens", "seconds": "seconds"}
MOST_COLUMNS = 8  # of a table


def columns_of(found: dict[str, Any]) -> list[list[str]]:
    """What table.json holds as columns, each its name and then its cells: those that answer the question first."""
    variants, loss = found["variants"], found["loss"]

    def column(name: str, cell: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *map(cell, variants)]

    def is_baseline(row: dict[str, Any]) -> bool:
        return row["variant"] == found["baseline"]

    def until(row: dict[str, Any]) -> str:
        needed = row["to_baseline"]
        return _figure(needed["samples"], ",.0f") if is_baseline(row) else _needed(needed)

    shown = [
        column("variant", lambda row: row["variant"] + " (baseline)" * is_baseline(row)),
        column("seeds", lambda row: str(len(row[loss]["by_seed"]))),
        column(loss, lambda row: _figure(row[loss])),
        column("against baseline", lambda row: _figure(row["difference"].get(loss), "+.4f")),
    ]
    names = dict.fromkeys(name for row in variants for name in row["metrics"])
    # first what says whether it looks, then what the specification asks for
    for name in sorted(names, key=lambda name: (not name.endswith(LOOKS), name.startswith("validation "))):
        shown.append(column(name, lambda row: _figure(row["metrics"].get(name))))
        shown.append(column(f"{name} against baseline", lambda row: _figure(row["difference"].get(name), "+.4f")))
    shown.append(column("samples to the baseline's loss", until))
    if loss != "distill_loss" and any(row["distill_loss"]["mean"] is not None for row in variants):
        shown.append(column("distill_loss", lambda row: _figure(row["distill_loss"])))
    for key, name in COUNTS.items():
        shown.append(column(name, lambda row: _figure({**row[key], "half": None}, ",.0f")))
    return shown


def console_table(found: dict[str, Any], width: int) -> Table:
    """The first columns, for a terminal of so many characters: as many as fit it without a break inside a word."""
    every = [
        [name.replace("_", "_\n"), *(cell.replace(" ± ", "±") for cell in cells)] for name, *cells in columns_of(found)
    ]
    longest = [max(len(word) for cell in column for word in cell.split()) for column in every]
    ends = accumulate(length + 3 for length in longest[:MOST_COLUMNS])
    num_shown = max(2, sum(end < width for end in ends))
    table = Table(title=found["name"])
    for number, (name, *_) in enumerate(every[:num_shown]):
        justify: Literal["left", "right"] = "right" if number else "left"
        table.add_column(name, justify=justify, overflow="fold", width=longest[number])
    for cells in list(zip(*every[:num_shown]))[1:]:
        table.add_row(*cells)
    table.caption = f"±: half of a 95 % interval over seeds. All {len(every)} columns are in table.md."
    return table


def _code(state: str) -> str:
    return state if state.startswith("version") else f"commit {state}"


def markdown(found: dict[str, Any]) -> str:
    """The page of what table.json holds."""
    variants, shown = found["variants"], columns_of(found)
    tables = []
    for start in range(1, len(shown), MOST_COLUMNS - 1):
        heads, *lines = zip(shown[0], *shown[start : start + MOST_COLUMNS - 1])
        tables.append(table(heads, lines, "lr"))
    warnings = "".join(f"* **{text}**\n" for text in found["warnings"])
    failed = "".join(f"* {row['variant']}, seed {n}: {why}\n" for row in variants for n, why in row["failed"].items())
    overrides = "".join(f"* {row['variant']}: `{' '.join(row['overrides']) or 'the recipe'}`\n" for row in variants)
    recipe = f"the recipe with `{' '.join(found['set'])}`" if found["set"] else "the recipe as it is"
    made_at = commit_in_words(found)
    return f"""# {found["name"]}

{(chr(10) * 2).join(tables)}

![{found["loss"]} against samples seen](curves.png)

{warnings + chr(10) if warnings else ""}{"Failed:" + chr(10) * 2 + failed + chr(10) if failed else ""}\
`±` is half of a 95 % interval over seeds (Student's t; none with a single seed); differences are paired by seed. An
interval that holds 0 shows no difference. {found["loss"]} is that of training, on samples as they come, a mean over
the last {found["window"]:.0%} of samples; curves are such running means. "Samples to the baseline's loss": where a
variant's curve is first as low as the baseline's of the same seed at its end. distill_loss compares only variants with
the same teacher, pairs and targets. Seconds are of steps, on the machine at hand, without loading and measuring.

Variants of {recipe}, seeds {", ".join(map(str, found["seeds"]))}:

{overrides}
Made by `{found["command"]}` at {_code(made_at)}; trained at {", ".join(map(_code, found["trained_at"]))}.
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
