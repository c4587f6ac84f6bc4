"""A page of samples as the model will see them: images with their patch grid, prompt and label tokens apart."""

import base64
import html
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin-top:2.2rem}
.figures{display:flex;gap:1rem;flex-wrap:wrap}.figures div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.figures b{display:block;font-size:1.7rem}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .7rem;border-bottom:1px solid #d8e0e8;text-align:right}
td:first-child,th:first-child{text-align:left;word-break:break-all}
.sample{border:1px solid #d8e0e8;border-radius:.6rem;padding:.8rem;margin:.9rem 0}
.sample img{max-width:100%;border:1px solid #d8e0e8;margin:0 .5rem .3rem 0;vertical-align:top}
.sample p{margin:.3rem 0;font:.86rem/1.5 ui-monospace,monospace;white-space:pre-wrap;word-break:break-word}
.name{color:#5b6b7b;font-size:.82rem}.prompt{background:#e3ecf7}.label{background:#cfeeda;font-weight:600}
.image{background:#f7e3c6}.bad td{text-align:left}svg text{font:12px system-ui,sans-serif;fill:#1c2733}
"""
NUM_BAD_SHOWN = 1000
SIDE = 320  # pixels of an image on the page, at most 4 times its own


def write_page(path, summary, bad, shown, processor):
    """Write samples.html.

    Args:
        summary, bad: from `dataset_statistics`.
        shown: list of (name, sample of `share_prefixes`).
    """
    figures = [
        (f"{summary['num_samples']:,}", "samples"),
        (f"{summary['num_conversations']:,}", "conversations"),
        (f"{summary['num_images']:,}", "images"),
        (f"{summary['num_bad']:,}", "bad samples"),
        (
            f"{100 * summary['packing_efficiency']:.1f} %",
            f"of a row's {summary['sequence_length']:,} tokens are filled",
        ),
        (f"{summary['samples_per_second']:,.0f}", "samples read per second"),
    ]
    bad_rows = "".join(
        f"<tr><td>{_short(one['record'])}</td><td>{html.escape(one['cause'])}</td></tr>" for one in bad[:NUM_BAD_SHOWN]
    )
    if len(bad) > NUM_BAD_SHOWN:
        bad_rows += f"<tr><td>and {len(bad) - NUM_BAD_SHOWN:,} more</td><td>see bad_samples.jsonl</td></tr>"
    bad_table = f'<table class="bad"><tr><th>where</th><th>why</th></tr>{bad_rows}</table>' if bad else "<p>None.</p>"
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>What training will read</title>
<style>{STYLE}</style><h1>What training will read</h1>
<div class="figures">{"".join(f"<div><b>{figure}</b>{text}</div>" for figure, text in figures)}</div>
<h2>Sources</h2>{_sources(summary)}
<h2>Tokens per sample</h2>{_histogram(summary["token_histogram"])}
<h2>Sizes</h2>{_sizes(summary)}
<h2>The first {len(shown)} samples</h2>
<p>As the model sees them: each image at the size it is given, with the grid of its image tokens;
<span class="image">image tokens</span>, <span class="prompt">what is given</span>,
<span class="label">what is to be learned</span>. Questions that share an image share its tokens.</p>
{"".join(_sample(name, sample, processor) for name, sample in shown)}
<h2>Bad samples</h2>{bad_table}
</html>"""
    path.write_text(page, encoding="utf-8")


def image_of_patches(patches, rows, columns, image_processor):
    """float[rows * columns, C*p*p] normalised patches back to the image they were cut from."""
    p = image_processor.patch_size
    pixels = patches.reshape(rows, columns, 3, p, p).transpose(0, 3, 1, 4, 2).reshape(rows * p, columns * p, 3)
    pixels = pixels * np.float32(image_processor.image_std) + np.float32(image_processor.image_mean)
    return Image.fromarray((pixels * 255).round().clip(0, 255).astype(np.uint8))


def token_runs(sample, tokenizer, image_token_id):
    """The conversations of a sample as runs of tokens: a list per conversation of (kind, text).

    Kinds: `image` with its number of tokens, `prompt`, and `label`: tokens that the place before each has to predict.
    """
    ids, targets, until = sample["input_ids"], sample["targets"], sample["seen_until"]
    conversations = []
    for end in sample["ends"]:
        path = np.flatnonzero((np.arange(len(ids)) <= end) & (until >= end))
        wanted = targets[path]
        kinds = ["prompt", *["label" if target != -100 else "prompt" for target in wanted[:-1]]]
        tokens = list(zip(ids[path].tolist(), kinds))
        if wanted[-1] != -100:
            tokens.append((int(wanted[-1]), "label"))
        tokens = [(token, "image" if token == image_token_id else kind) for token, kind in tokens]
        runs = []
        for token, kind in tokens:
            if not runs or runs[-1][0] != kind:
                runs.append((kind, []))
            runs[-1][1].append(token)
        conversations.append(
            [(kind, f"[{len(r)} image tokens]" if kind == "image" else tokenizer.decode(r)) for kind, r in runs]
        )
    return conversations


def _short(name):
    """A name without the folder that the command ran in."""
    return html.escape(name.removeprefix(f"{Path.cwd()}/"))


def _sample(name, sample, processor):
    images, first = [], 0
    for frames, rows, columns in sample.get("image_grid_thw", np.zeros((0, 3), int)).tolist():
        for _ in range(frames):
            patches = sample["pixel_values"][first : first + rows * columns]
            first += rows * columns
            image = image_of_patches(patches, rows, columns, processor.image_processor)
            images.append(f'<img alt="" src="{data_url(with_grid(image, processor.image_processor))}">')
    texts = []
    for runs in token_runs(sample, processor.tokenizer, processor.image_token_id):
        texts.append("".join(f'<span class="{kind}">{html.escape(text)}</span>' for kind, text in runs))
    return (
        f'<div class="sample"><div class="name">{_short(name)}: {len(sample["input_ids"])} tokens</div>'
        f"{''.join(images)}{''.join(f'<p>{text}</p>' for text in texts)}</div>"
    )


def with_grid(image, image_processor, side=SIDE):
    """An image as the model sees it, enlarged towards `side` pixels, with the borders of its image tokens."""
    token = image_processor.patch_size * image_processor.patch_merge
    scale = max(1, min(4, side // max(image.size)))
    shown = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).convert("RGB")
    draw = ImageDraw.Draw(shown, "RGBA")
    for shift, colour in ((0, (255, 255, 255, 130)), (1, (0, 0, 0, 70))):  # to be seen on light and on dark
        for x in range(token * scale, shown.width, token * scale):
            draw.line([(x + shift, 0), (x + shift, shown.height)], colour)
        for y in range(token * scale, shown.height, token * scale):
            draw.line([(0, y + shift), (shown.width, y + shift)], colour)
    return shown


def data_url(image, kind="jpeg"):
    """An image inside a page: `jpeg`, or `png` where every pixel counts."""
    buffer = BytesIO()
    image.save(buffer, format=kind, quality=90)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode()


def _sources(summary):
    rows = "".join(
        f"<tr><td>{_short(one['name'])}</td><td>{one['num_rows']:,}</td><td>{one['num_bad']:,}</td>"
        f"<td>{100 * one['share_of_samples']:.1f} %</td><td>{100 * one['share_of_tokens']:.1f} %</td>"
        f"<td>{one['mean_tokens'] or 0:,.0f}</td></tr>"
        for one in summary["sources"]
    )
    heads = ("source", "rows", "bad", "share of samples", "share of tokens", "tokens per sample")
    return f"<table><tr>{''.join(f'<th>{head}</th>' for head in heads)}</tr>{rows}</table>"


def _sizes(summary):
    keys = ("tokens_per_sample", "label_tokens_per_sample", "image_tokens_per_image", "image_width", "image_height")
    columns = list(summary["tokens_per_sample"])
    rows = "".join(
        f"<tr><td>{key.replace('_', ' ')}</td>{''.join(f'<td>{summary[key][c]:,.0f}</td>' for c in columns)}</tr>"
        for key in keys
        if summary[key]
    )
    return f"<table><tr><th></th>{''.join(f'<th>{column}</th>' for column in columns)}</tr>{rows}</table>"


def _histogram(histogram, width=900, height=180):
    counts, edges = histogram["counts"], histogram["edges"]
    if not counts:
        return "<p>None.</p>"
    step, most = width / len(counts), max(counts)
    bars = "".join(
        f'<rect x="{i * step + 1:.1f}" y="{height - height * count / most:.1f}" width="{step - 2:.1f}" '
        f'height="{height * count / most:.1f}" fill="#4a7fb5"><title>{count}</title></rect>'
        for i, count in enumerate(counts)
    )
    labels = "".join(
        f'<text x="{i * step:.1f}" y="{height + 16}">{edges[i]:,.0f}</text>'
        for i in range(0, len(counts), max(1, len(counts) // 8))
    )
    last = f'<text x="{width}" y="{height + 16}" text-anchor="end">{edges[-1]:,.0f}</text>'
    return f'<svg viewBox="0 0 {width} {height + 22}" width="100%">{bars}{labels}{last}</svg>'
