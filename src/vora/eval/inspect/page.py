"""`vora inspect`, the page: panels as HTML that needs nothing beside it, and their figures as JSON."""

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from vora.eval.inspect.panels import panels_of
from vora.model.image_processing_vora import VoraImageProcessor
from vora.report.html import page
from vora.report.images import data_url

if TYPE_CHECKING:
    from vora.eval.inspect.inspection import Inspection

STYLE = """\
h2{margin:2.2rem 0 .2rem}.caption{color:#5b6b7b;font-size:.88rem;margin:.2rem 0 .9rem}
.known{display:flex;gap:1rem;flex-wrap:wrap}.known div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.known b{display:block;font-size:1.3rem}.remark{background:#f7e3c6;border-radius:.6rem;padding:.6rem 1rem}
.tiles{display:flex;gap:.8rem;flex-wrap:wrap;align-items:flex-start}figure{margin:0;font-size:.78rem;line-height:1.35}
figcaption{white-space:pre-line;overflow-wrap:anywhere;color:#5b6b7b}figcaption b{color:#1c2733;font-size:.9rem}
img{display:block;margin-bottom:.2rem}
"""
NARROWEST = 84  # label, in pixels


def write_inspection(
    path: str | Path,
    found: "Inspection",
    image_processor: VoraImageProcessor,
    image: str,
    model: str,
    remarks: Sequence[str] = (),
) -> None:
    """Write a page, and beside it a JSON of the same name.

    Args:
        path: of the page, ending in .html; folders on the way are made.
        image, model: their names, to be shown.
        remarks: sentences that a reader must know.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = {"question": found.question, "answer": found.answer or "(nothing)", "model": model}
    if found.teacher is not None:
        known["teacher"] = found.teacher
    body = "".join(f'<p class="remark">{escape(remark)}</p>' for remark in remarks)
    body += '<div class="known">'
    body += "".join(f"<div>{name}<b>{escape(fact)}</b></div>" for name, fact in known.items()) + "</div>"
    for panel in panels_of(found, image_processor):
        body += f'<h2>{escape(panel.title)}</h2><p class="caption">{escape(panel.caption)}</p>'
        body += f'<div class="tiles">{"".join(_tile(*tile) for tile in panel.tiles)}</div>'
    path.write_text(page("How a model sees an image", body, STYLE), encoding="utf-8")
    figures = {"image": image, "model": model, **found.as_json(), "remarks": list(remarks)}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tile(heading: str, label: str, image: Image.Image) -> str:
    title = f"<b>{escape(heading)}</b>\n" if heading else ""
    words = f"<figcaption>{title}{escape(label)}</figcaption>" if heading or label else ""
    width, alt = max(image.width, NARROWEST), escape(heading)
    return f'<figure style="width:{width}px"><img alt="{alt}" src="{data_url(image, "png")}">{words}</figure>'
