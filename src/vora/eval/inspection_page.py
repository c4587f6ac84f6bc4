"""`vora inspect`, the page: panels as HTML that needs nothing beside it, as one PNG, and their figures as JSON."""

import html
import json
from functools import lru_cache
from pathlib import Path

from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFont

from vora.data.page import data_url
from vora.eval.inspection_panels import panels_of

TITLE = "How a model sees a picture"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin:2.2rem 0 .2rem}.caption{color:#5b6b7b;font-size:.88rem;margin:.2rem 0 .9rem}
.facts{display:flex;gap:1rem;flex-wrap:wrap}.facts div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.facts b{display:block;font-size:1.3rem}.remark{background:#f7e3c6;border-radius:.6rem;padding:.6rem 1rem}
.tiles{display:flex;gap:.8rem;flex-wrap:wrap;align-items:flex-start}figure{margin:0;font-size:.78rem;line-height:1.35}
figcaption{white-space:pre-line;overflow-wrap:anywhere;color:#5b6b7b}figcaption b{color:#1c2733;font-size:.9rem}
img{display:block;max-width:100%;margin-bottom:.2rem}
"""
INK, PALE, PAPER = "#1c2733", "#5b6b7b", "white"
WIDTH, MARGIN, SPACE = 1168, 24, 14  # of the PNG, in pixels
NARROWEST = 84  # label, in pixels


def write_inspection(path, found, image_processor, image, model, remarks=()):
    """Write a page, and beside it a PNG and a JSON of the same name.

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
    _sheet(facts, remarks, panels).save(path.with_suffix(".png"))
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


def _tile(heading, label, picture):
    title = f"<b>{html.escape(heading)}</b>\n" if heading else ""
    words = f"<figcaption>{title}{html.escape(label)}</figcaption>" if heading or label else ""
    width, alt = max(picture.width, NARROWEST), html.escape(heading)
    return f'<figure style="width:{width}px"><img alt="{alt}" src="{data_url(picture, "png")}">{words}</figure>'


def _sheet(facts, remarks, panels):
    """The same on one tall picture."""
    pieces = [_text(TITLE, 24, bold=True), *(_text(remark, 14, PALE) for remark in remarks)]
    pieces += [_text(f"{name}: {fact}", 15) for name, fact in facts]
    for panel in panels:
        pieces += [_text(panel.title, 19, bold=True, above=SPACE), _text(panel.caption, 13, PALE), _tiles(panel.tiles)]
    sheet = Image.new("RGB", (WIDTH, sum(piece.height + SPACE for piece in pieces) + 2 * MARGIN - SPACE), PAPER)
    top = MARGIN
    for piece in pieces:
        sheet.paste(piece, (MARGIN, top))
        top += piece.height + SPACE
    return sheet


def _tiles(tiles):
    """Tiles with their labels, left to right, as many to a line as fit."""
    lines, left = [[]], 0
    for heading, label, picture in tiles:
        width = max(picture.width, NARROWEST)
        words = [_text(heading, 13, bold=True, width=width)] if heading else []
        words += [_text(line, 11, PALE, width=width) for line in label.split("\n") if line]
        cell = _column([picture, *words])
        if lines[-1] and left + cell.width > WIDTH - 2 * MARGIN:
            lines.append([])
            left = 0
        lines[-1].append((left, cell))
        left += cell.width + SPACE
    heights = [max((cell.height for _, cell in line), default=0) for line in lines]
    whole = Image.new("RGB", (WIDTH - 2 * MARGIN, sum(heights) + SPACE * (len(lines) - 1)), PAPER)
    top = 0
    for line, height in zip(lines, heights):
        for left, cell in line:
            whole.paste(cell, (left, top))
        top += height + SPACE
    return whole


def _column(pictures):
    whole = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures) + 4), PAPER)
    top = 0
    for number, picture in enumerate(pictures):
        whole.paste(picture, (0, top))
        top += picture.height + (4 if number == 0 else 0)
    return whole


def _text(text, size, colour=INK, bold=False, width=WIDTH - 2 * MARGIN, above=0):
    """Text as a picture, broken where it would exceed a width, inside words if need be."""
    font = _font(size, bold)
    lines = [""]
    for word in text.split():
        for part in [word] if font.getlength(word) <= width else word:
            glue = "" if part is not word or not lines[-1] else " "
            if font.getlength(lines[-1] + glue + part) > width and lines[-1]:
                lines.append(part)
            else:
                lines[-1] += glue + part
    step = round(1.35 * size)
    picture = Image.new("RGB", (max(1, round(width)), step * len(lines) + above), PAPER)
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(lines):
        draw.text((0, above + number * step), line, colour, font)
    return picture


@lru_cache
def _font(size, bold):
    """DejaVu Sans, which comes with matplotlib."""
    wanted = font_manager.FontProperties(family="DejaVu Sans", weight="bold" if bold else "normal")
    return ImageFont.truetype(font_manager.findfont(wanted), size)
