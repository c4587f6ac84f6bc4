"""Pages that need nothing beside them: one look, and the few parts they share."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """\
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin:2.2rem 0 .4rem}
.facts{display:flex;gap:1rem;flex-wrap:wrap}.facts div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.facts div{min-width:0;overflow-wrap:anywhere}.facts b{display:block;font-size:1.5rem}
.remark{background:#f7e3c6;border-radius:.6rem;padding:.6rem 1rem}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .7rem;border-bottom:1px solid #d8e0e8;text-align:right}
td:first-child,th:first-child{text-align:left;overflow-wrap:anywhere;min-width:8rem}
img{max-width:100%}pre{background:#f2f5f8;padding:1rem;border-radius:.6rem;white-space:pre-wrap;overflow-wrap:anywhere}
svg{width:100%;max-width:36rem}svg text{font:12px system-ui,sans-serif;fill:#1c2733}svg line{stroke:#d8e0e8}
.wide{overflow-x:auto}.wide img{min-width:36rem}
details{margin:.8rem 0}summary{cursor:pointer}summary h2{display:inline}
@media(max-width:40rem){.facts{gap:.5rem}.facts div{padding:.4rem .7rem}.facts b{font-size:1.1rem}
td,th{padding:.25rem .22rem;font-size:.8rem}td:first-child,th:first-child{min-width:3.6rem}
body{margin:1rem auto}}
"""


def page(title: str, body: str, style: str = "") -> str:
    """A whole page; `body` is HTML, `style` further CSS."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{STYLE}{style}</style>\n<h1>{escape(title)}</h1>\n{body}\n</html>\n"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Boxes side by side: a large figure, and what it is."""
    boxes = (f"<div><b>{escape(figure)}</b>{escape(what)}</div>" for figure, what in pairs)
    return f'<div class="facts">{"".join(boxes)}</div>'


def remark(text: str) -> str:
    """What a reader must know, in a box."""
    return f'<p class="remark">{escape(text)}</p>'


def folded(summary: str, body: str, is_open: bool = False) -> str:
    """What is read on request; `summary` and `body` are HTML."""
    return f"<details{' open' if is_open else ''}><summary>{summary}</summary>{body}</details>"


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], kind: str = "") -> str:
    """A table of texts; `kind` is its CSS class."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{escape(str(one))}</td>' for one in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{body}</table></div>'


def histogram(
    counts: Sequence[int], edges: Sequence[float], x: str = "", y: str = "", width: int = 400, height: int = 130
) -> str:
    """Bars with axes, named `x` and `y`, as SVG; `edges` has one more entry than `counts`."""
    if not any(counts):
        return "<p>None.</p>"
    left, top, step, scale = 52, 18, (width - 52) / len(counts), height / max(counts)
    bottom = top + height
    marks = [
        f'<line x1="{left}" x2="{width}" y1="{bottom - scale * tick:.1f}" y2="{bottom - scale * tick:.1f}"/>'
        f'<text x="{left - 5}" y="{bottom - scale * tick + 4:.1f}" text-anchor="end">{tick:,}</text>'
        for tick in ticks(max(counts))
    ]
    marks += [
        f'<rect x="{left + i * step + 1:.1f}" y="{bottom - scale * count:.1f}" width="{max(step - 2, 1):.1f}" '
        f'height="{scale * count:.1f}" fill="#4a7fb5"><title>{count}</title></rect>'
        for i, count in enumerate(counts)
    ]
    every = -(-len(edges) // 6)
    marks += [
        f'<text x="{left + i * step:.1f}" y="{bottom + 16}" text-anchor="middle">{edges[i]:,.0f}</text>'
        for i in range(0, len(counts) - every // 2, every)
    ]
    marks.append(f'<text x="{width}" y="{bottom + 16}" text-anchor="end">{edges[-1]:,.0f}</text>')
    marks.append(f'<text x="{(left + width) / 2}" y="{bottom + 34}" text-anchor="middle">{escape(x)}</text>')
    marks.append(f'<text x="0" y="12">{escape(y)}</text>')
    return f'<svg viewBox="0 0 {width} {bottom + 40}">{"".join(marks)}</svg>'


def ticks(most: int) -> list[int]:
    """Round numbers from 0 up to `most`, at most six."""
    size = 10 ** (len(str(most)) - 1)
    step = next(step for step in (size // 5, size // 2, size, 2 * size) if step and most // step <= 5)
    return list(range(0, most + 1, step))
