"""Markdown tables."""

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], align: str = "") -> str:
    """A table; `align` has `l` or `r` per column, of which the last holds for those that follow; default: left."""
    sides = (align or "l").ljust(len(heads), align[-1:] or "l")
    rule = ["---:" if side == "r" else "---" for side in sides]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (heads, rule, *rows))
