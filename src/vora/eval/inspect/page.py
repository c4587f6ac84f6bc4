"""`vora inspect`, the page: panels as HTML that needs nothing beside it, and their figures as JSON."""

import html
import json
from pathlib import Path

from vora.eval.inspect.panels import panels_of
from vora.report.images import data_url

TITLE = "How a model sees an image"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin:2.2rem 0 .2rem}.caption{color:#5b6b7b;font-size:.88rem;margin:.2rem 0 .9rem}
.facts{display:flex;gap:1rem;flex-wrap:wrap}.facts div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.facts b{display:block;font-size:1.3rem}.remark{background:#f7e3c6;border-radius:.6rem;padding:.6rem 1rem}
.tiles{display:flex;gap:.8rem;flex-wrap:wrap;align-items:flex-start}figure{margin:0;font-size:.78rem;line-height:1.35}
figcaption{white-space:pre-line;overflow-wrap:anywhere;color:#5b6b7b}figcaption b{color:#1c2733;font-size:.9rem}
img{display:block;max-width:100%;margin-bottom:.2rem}
"""
NARROWEST = 84  # label, in pixels


def write_inspection(path, found, image_processor, image, model, remarks=()):
    """Write a page, and beside it a JSON of the same name.

    Args:
        path: of the page, ending in .html; folders on the way are made.
        found: an `Inspection`.
        image, model: their names, to be shown.
        remarks: sentences that a reader must know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = [("asked", found.question), ("answered", found.answer or "(nothing)"), ("model", model)]
    if found.teacher is not None:
        facts.append(("teacher", found.teacher))
    panels = panels_of(found, image_processor)
    path.write_text(_page(facts, remarks, panels), encoding="utf-8")
    figures = {"image": image, "model": model, **found.as_json(), "remarks": list(remarks)}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _page(facts, remarks, panels):
    known = "".join(f"<div>{html.escape(name)}<b>{html.escape(fact)}</b></div>" for name, fact in facts)
    noted = "".join(f'<p class="remark">{html.escape(remark)}</p>' for remark in remarks)
    parts = "".join(
        f'<h2>{html.escape(panel.title)}</h2><p class="caption">{html.escape(panel.caption)}</p>'
        f'<div class="tiles">{"".join(_tile(*tile) for tile in panel.tiles)}</div>'
        for panel in panels
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{TITLE}</title><style>{STYLE}</style>'
        f'<h1>{TITLE}</h1>{noted}<div class="facts">{known}</div>{parts}</html>'
    )


def _tile(heading, label, image):
    title = f"<b>{html.escape(heading)}</b>\n" if heading else ""
    words = f"<figcaption>{title}{html.escape(label)}</figcaption>" if heading or label else ""
    width, alt = max(image.width, NARROWEST), html.escape(heading)
    return f'<figure style="width:{width}px"><img alt="{alt}" src="{data_url(image, "png")}">{words}</figure>'
