"""Pages that need nothing beside them: one look, and the few parts they share."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """\
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin:2.2rem 0 .4rem}
.facts{display:flex;gap:1rem;flex-wrap:wrap}.facts div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.facts b{display:block;font-size:1.5rem}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .7rem;border-bottom:1px solid #d8e0e8;text-align:right}
td:first-child,th:first-child{text-align:left;word-break:break-all}
img{max-width:100%}pre{background:#f2f5f8;padding:1rem;border-radius:.6rem;overflow-x:auto}
svg text{font:12px system-ui,sans-serif;fill:#1c2733}
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; `body` is HTML, `style` further CSS."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Boxes side by side: a large figure, and what it is."""
    boxes = (f"<div><b>{escape(figure)}</b>{escape(what)}</div>" for figure, what in pairs)
    return f'<div class="facts">{"".join(boxes)}</div>'


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table of texts; `kind` is its CSS class."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(one))}</td>' for one in row)}</tr>" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>{body}</table>'


def histogram(counts: Sequence[int], edges: Sequence[float], width: int = 900, height: int = 180) -> str:
    """Bars as SVG; `edges` has one more entry than `counts`."""
    if not any(counts):
        return "<p>None.</p>"
    step, scale, every = width / len(counts), height / max(counts), max(1, len(counts) // 8)
    marks = [
        f'<rect x="{i * step + 1:.1f}" y="{height - scale * count:.1f}" width="{step - 2:.1f}" '
        f'height="{scale * count:.1f}" fill="#4a7fb5"><title>{count}</title></rect>'
        for i, count in enumerate(counts)
    ]
    marks += [
        f'<text x="{i * step:.1f}" y="{height + 16}">{edges[i]:,.0f}</text>' for i in range(0, len(counts), every)
    ]
    marks.append(f'<text x="{width}" y="{height + 16}" text-anchor="end">{edges[-1]:,.0f}</text>')
    return f'<svg viewBox="0 0 {width} {height + 22}" width="100%">{"".join(marks)}</svg>'
