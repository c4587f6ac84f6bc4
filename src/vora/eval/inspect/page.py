"""`vora inspect`, the page: figures as tiles, each panel with what it shows and what not, and beside it a JSON.

Dims: I image tokens.
"""

import json
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps

from vora.eval.inspect.inspection import Inspection
from vora.eval.metrics.cka import FEWEST_TOKENS, MOST_TOKENS
from vora.model.image_processing_vora import VoraImageProcessor
from vora.report.html import facts, folded, page, remark
from vora.report.images import data_url, with_grid
from vora.report.plots import new_figure

STYLE = """\
.finding{font-size:1.15rem}.caption,details details{color:#5b6b7b;font-size:.88rem;margin:.2rem 0 .9rem}
.facts b{font-size:1.1rem}
.tiles{display:flex;gap:.8rem;flex-wrap:wrap;align-items:flex-start}figure{margin:0;max-width:100%;font-size:.78rem;line-height:1.35}
figcaption{white-space:pre-line;overflow-wrap:anywhere;color:#5b6b7b}figcaption b{color:#1c2733;font-size:.9rem}
img{display:block;margin-bottom:.2rem}@media(max-width:40rem){.tiles{gap:.4rem}}
"""
TILE, WORD_TILE = 104, 150  # sides in pixels of a square image's tiles; other images' have the same area
IMAGE = 640  # longer side at most, if the image is not larger by itself
LONGEST = 16  # times as long as wide is a tile at most
GAP, NARROWEST = 4, 84  # between stacked images; label, in pixels
BRIGHTEST = 0.98  # quantile of the patches from which on all are as bright
CONTRAST = "each image stretched from no attention to that of its brightest patches"
FEWEST_WORDS = 3  # of which a mean says what is common to them
MOST_DOUBLINGS = 2
NEAREST = Image.Resampling.NEAREST
LINES = (("cosine", "cosine, as trained"), ("centred_cosine", "cosine, mean taken off"), ("cka", "CKA, without heads"))

Grid = tuple[int, int]  # rows and columns of image tokens


def write_inspection(
    path: str | Path,
    found: Inspection,
    image_processor: VoraImageProcessor,
    image: str,
    model: str,
    remarks: Sequence[str] = (),
) -> None:
    """Write a page, whose path ends in .html, and beside it a JSON of the same name; `image` and `model` are names to
    be shown, `remarks` sentences that a reader must know."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    known = [(found.question, "question"), (found.answer or "(nothing)", "answer"), (model, "model")]
    panels = [_seen(found, image_processor)]
    if found.words:
        panels += [_words(found), _blocks(found)]
    panels.append(_components(found))
    if found.teacher is not None:
        known.append((found.teacher, "teacher"))
        panels.append(_likeness(found))
    said = finding(found)
    body = f'<p class="finding">{escape(said)}</p>{"".join(map(remark, remarks))}{facts(known)}{"".join(panels)}'
    path.write_text(page("How a model sees an image", body, STYLE), encoding="utf-8")
    figures = {"image": image, "model": model, "finding": said, **found.as_json(), "remarks": list(remarks)}
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def finding(found: Inspection) -> str:
    """In a sentence: how much of its attention went to the image, where most, and how like the teacher it sees it."""
    if not found.words:
        return (
            "Its blocks have no attention to show." if found.answer else "It answered nothing, so it looked nowhere."
        )
    shares = [torch.tensor([*word.share_by_block().values()]) for word in found.words]
    by_block, even = torch.stack(shares).mean(0), fmean(word.even_share for word in found.words)
    most = list(found.words[0].attention)[int(by_block.argmax())]
    text = (
        f"While it answered, {_percent(float(by_block.mean()))} of its attention fell on the image (spread evenly it "
        f"would be {_percent(even)}), most in {_block_name(most)}, with {_percent(float(by_block.max()))}"
    )
    alike = [[float(pair[name]) for pair in found.pair_likeness] for name in ("cka", "cka_mirrored")]
    if found.teacher is None or not np.isfinite(alike).all():
        return f"{text}."
    own, mirrored = map(fmean, alike)
    return (
        f"{text}; its blocks are like the teacher's with a CKA of {own:.2f} (1: the same, 0: nothing in common), and "
        f"of {mirrored:.2f} where the teacher sees the mirrored image."
    )


def _panel(
    title: str, shown: str, caption: str, tiles: Sequence[tuple[str, str, Image.Image]], is_open: bool = False
) -> str:
    """HTML of something to look at: what it is, what it shows, how to read it; (heading, label, image) per tile."""
    figures = ""
    for heading, label, image in tiles:
        bold = f"<b>{escape(heading)}</b>\n" if heading else ""
        words = f"<figcaption>{bold}{escape(label)}</figcaption>" if heading or label else ""
        source, width = data_url(image, "png"), max(image.width, NARROWEST)
        figures += f'<figure style="width:{width}px"><img alt="{escape(heading)}" src="{source}">{words}</figure>'
    how = folded("How to read it, and what it does not say", f"<p>{escape(caption)}</p>") if caption else ""
    body = f'<p class="caption">{escape(shown)}</p>{how}<div class="tiles">{figures}</div>'
    return folded(f"<h2>{escape(title)}</h2>", body, is_open)


def _seen(found: Inspection, image_processor: VoraImageProcessor) -> str:
    rows, columns = found.grid
    token_pixels = image_processor.patch_size * image_processor.patch_merge
    image = ImageOps.expand(with_grid(found.image, token_pixels, IMAGE), 1, "#d8e0e8")
    return _panel(
        "What the model is given",
        f"The image at the size at which the model reads it, {found.image.width} x {found.image.height} pixels, "
        f"cut into {rows} x {columns} image tokens. It sees nothing finer.",
        "",
        [("", "", image)],
        is_open=True,
    )


def _components(found: Inspection) -> str:
    teacher_of, tiles = dict(found.pairs), []
    for block, colours in found.colours.items():
        image, label = _tile(colours, found.grid, TILE), _percent(sum(found.variance[block]))
        if (other := teacher_of.get(block)) is not None:
            image = _stacked(image, _tile(found.teacher_colours[other], found.grid, TILE))
            label += f"\nteacher {int(other) + 1}: {_percent(sum(found.teacher_variance[other]))}"
        tiles.append((_block_name(block), label, image))
    beside = (
        " Below it, where a block has a partner, the teacher's features of the same patches, brought to the order "
        "and signs that agree best with the block above, so likeness is shown at its best."
    )
    return _panel(
        "What differs from patch to patch, block by block",
        "One square per image token: where colours differ, the block tells patches apart.",
        "The first three principal components of the tokens are red, green and blue, each "
        f"stretched over this image.{beside if found.teacher else ''} The percentage is how much of all differences "
        "between tokens the three hold; the rest is not seen. Input is what enters the first block. Order and signs "
        "follow the block before. Colours have no names, and are not the same in another image. That patches differ "
        "does not say that the model understands why.",
        tiles,
    )


def _likeness(found: Inspection) -> str:
    num_tokens = found.grid[0] * found.grid[1]
    learned, rough = "", ""
    if "cosine" in (found.pair_likeness or [{}])[0]:
        learned = (
            "Cosine, as trained: between what the distill head says of each patch and the teacher's feature, the very "
            "thing that training maximises. Mean taken off: the same once each side's mean over this image is "
            "subtracted, so that only what tells patches apart counts. "
        )
    if num_tokens < FEWEST_TOKENS:
        rough = f" CKA takes {FEWEST_TOKENS} image tokens; here are {num_tokens}."
    elif num_tokens < 64:
        rough = f" {num_tokens} tokens give a rough estimate of CKA."
    elif num_tokens > MOST_TOKENS:
        rough = f" CKA is of {MOST_TOKENS} of the tokens, evenly spaced."
    return _panel(
        "How alike to the teacher",
        "Lines are the likeness of each pair of blocks; as far as one lies above its dashes, the model has learned "
        "what is where in this image.",
        f"{learned}CKA compares without any head: 1 where both find the same patches alike, 0 on average where they "
        "have nothing in common (it can fall below). Dashed: the same measure when the teacher looks at the mirrored "
        "image. What is left there comes from what no mirror changes (averages, symmetry, rows) and not from what "
        f"is where in this image; that is the distance between a line and its dashes.{rough} One image is no "
        "measurement of a model. On the map, dots are the pairs of blocks that stand side by side.",
        [("", "", _drawn(_lines(found))), ("", "", _drawn(_map(found)))],
    )


def _words(found: Inspection) -> str:
    mean = torch.stack([word.map() for word in found.words]).mean(0)
    most = max(share for word in found.words for share in word.share_by_block().values())
    tiles, compared = [], ""
    for word in found.words:
        shares = list(word.share_by_block().values())
        images = [_lit(found, word.map(), WORD_TILE)]
        if len(found.words) >= FEWEST_WORDS:
            ratio = (word.map() / mean.clamp(min=1e-12)).clamp(min=1e-12).log2() / (2 * MOST_DOUBLINGS) + 0.5
            images.append(_tile(_mapped(ratio, "coolwarm"), found.grid, WORD_TILE))
        strip = _mapped(np.array(shares) / max(most, 1e-12), "viridis")
        images.append(_pixels(strip[None]).resize((images[0].width, 10), NEAREST))
        label = f"{_percent(sum(shares) / len(shares))} on the image\n(evenly: {_percent(word.even_share)})"
        tiles.append((word.text, label, _stacked(*images)))
    if len(found.words) >= FEWEST_WORDS:
        compared = (
            " Below, patch by patch against the mean of all the answer's words: red more, blue less, "
            f"{2**MOST_DOUBLINGS} times at most."
        )
    return _panel(
        "Where the model looked for each word",
        "Bright: read from most when the word was chosen.",
        "Attention to the image tokens from the place where each word was chosen, which is the one before it; mean "
        f"over heads, blocks and the word's tokens, {CONTRAST}.{compared} The percentage is how much of all "
        "attention falls on the image, beside what an even spread over everything in sight would give. The strip "
        "is that share block by block, the first at the left, the same scale for all words: dark 0 %, yellow "
        f"{_percent(most)}. Attention is not an explanation: it says what was read from, not what was used or why. "
        "After the first blocks an image token also holds what it read from others, so a dark patch may have "
        "mattered through a bright one, and many heads rest on some token that means nothing to them.",
        tiles,
        is_open=True,
    )


def _blocks(found: Inspection) -> str:
    tiles = []
    for block in found.words[0].attention:
        attention = torch.stack([word.attention[block] for word in found.words]).mean(0)
        tiles.append((_block_name(block), _percent(float(attention.sum())), _lit(found, attention, TILE)))
    return _panel(
        "Which blocks look where",
        "The same attention for each block by itself; the percentage is the share that falls on the image.",
        f"It is the mean over the words and heads, {CONTRAST}. Where the share is near 0, the bright patches are "
        "nearly nothing too.",
        tiles,
    )


def _block_name(block: int) -> str:
    return "input" if block == -1 else f"block {block + 1}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.1f} %"


def _pixels(colours: np.ndarray) -> Image.Image:
    """float[rows, columns, 3] in 0..1 as an image, one pixel each."""
    return Image.fromarray((colours * 255).round().astype(np.uint8))


def _tile(colours: torch.Tensor | np.ndarray, grid: Grid, side: int) -> Image.Image:
    """float[I, 3] as a tile: the image's shape, of the area of a square with this side."""
    aspect = min(LONGEST, max(1 / LONGEST, grid[1] / grid[0]))
    size = round(side * aspect**0.5), round(side / aspect**0.5)
    return _pixels(np.asarray(colours).reshape(*grid, 3)).resize(size, NEAREST)


def _mapped(values: torch.Tensor | np.ndarray, name: str) -> np.ndarray:
    """Values in 0..1 through a colour map: float[..., 3]."""
    return colormaps[name](np.asarray(values))[..., :3]


def _lit(found: Inspection, attention: torch.Tensor, side: int) -> Image.Image:
    """The attention to the image tokens, float[I], with the image shining through."""
    heat = attention / attention.quantile(BRIGHTEST).clamp(min=1e-12)
    tile = _tile(_mapped(heat, "inferno"), found.grid, side)
    grey = ImageOps.autocontrast(found.image.convert("L")).convert("RGB").resize(tile.size)
    return Image.blend(grey, tile, 0.75)


def _stacked(*images: Image.Image) -> Image.Image:
    """Images of one width one above the other, with a gap."""
    gap = np.full((GAP, images[0].width, 3), 255, np.uint8)
    return Image.fromarray(np.vstack([part for image in images for part in (gap, np.asarray(image))][1:]))


def _lines(found: Inspection) -> Figure:
    """Likeness of the pairs."""
    figure, axes = new_figure(5.6, 3.6)
    blocks = [likeness["student"] + 1 for likeness in found.pair_likeness]
    for colour, (name, label) in enumerate(LINES):
        for mark, style in (("", "-o"), ("_mirrored", "--")):
            values = [float(likeness[name + mark]) for likeness in found.pair_likeness if name in likeness]
            if values:
                shown = None if mark else label
                axes.plot(blocks, values, style, color=f"C{colour}", label=shown, markersize=3)
    axes.axhline(0, color="#5b6b7b", linewidth=0.8)
    axes.set(xlabel="block of the model", ylabel="likeness to the teacher's block", ylim=(None, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _map(found: Inspection) -> Figure:
    """Likeness of all blocks."""
    figure, axes = new_figure(5.6, 3.6)
    blocks, teacher_blocks = ([block + 1 for block in found.cka[name]] for name in ("blocks", "teacher_blocks"))
    values = np.asarray(found.cka["cka"]).T
    mesh = axes.pcolormesh(blocks, teacher_blocks, values, cmap="viridis", vmin=0, vmax=1, shading="nearest")
    axes.plot(*([block + 1 for block in side] for side in zip(*found.pairs)), "o", color="white", mec="black", ms=4)
    axes.set(xlabel="block of the model (0: what enters the first)", ylabel="block of the teacher")
    figure.colorbar(mesh, label="CKA")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator("auto", integer=True))
    return figure


def _drawn(figure: Figure) -> Image.Image:
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=96)
    return Image.open(buffer).convert("RGB")
