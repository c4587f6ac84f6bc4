"""A page of samples as the model will see them: images with their patch grid, prompt and label tokens apart."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from vora.data.packing import TokenSample
from vora.report.html import facts, histogram, page, table
from vora.report.images import data_url, image_of_patches, with_grid

STYLE = """
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr));gap:.8rem}
.sample{border:1px solid #d8e0e8;border-radius:.6rem;padding:.8rem;overflow:hidden}
.sample img{border:1px solid #d8e0e8;margin:.3rem .4rem .3rem 0;vertical-align:top;max-height:16rem}
.sample p{margin:.3rem 0;font:.8rem/1.5 ui-monospace,monospace;white-space:pre-wrap;overflow-wrap:anywhere}
.sample .texts{max-height:24rem;overflow-y:auto}
.name{color:#5b6b7b;font-size:.82rem;overflow-wrap:anywhere}.prompt{background:#e3ecf7}.label{background:#cfeeda;font-weight:600}
.image{background:#f7e3c6}.text td,.text th{text-align:left}
"""
NUM_BAD_SHOWN = 1000
SOURCE_COLUMNS = ("source", "rows", "bad", "share of samples", "share of tokens", "tokens per sample")
SIZES = ("tokens_per_sample", "label_tokens_per_sample", "image_tokens_per_image", "image_width", "image_height")


def write_page(
    path: Path,
    summary: Mapping[str, Any],
    bad: Sequence[Mapping[str, str]],
    shown: Sequence[tuple[str, TokenSample]],
    processor: Any,
) -> None:
    """Write samples.html of the `summary` and `bad` of `dataset_statistics` and some named samples."""
    figures = [(f"{summary[f'num_{what}']:,}", what) for what in ("samples", "conversations", "images")]
    filled = f"of a packed sequence's {summary['sequence_length']:,} tokens are filled"
    figures += [(f"{summary['num_bad']:,}", "bad samples"), (f"{100 * summary['packing_efficiency']:.1f} %", filled)]
    figures.append((f"{summary['samples_per_second']:,.0f}", "samples read per second"))
    tokens, columns = summary["token_histogram"], list(summary["tokens_per_sample"])
    sizes = [
        (key.replace("_", " "), *(f"{one:,.0f}" for one in summary[key].values())) for key in SIZES if summary[key]
    ]
    causes = [(_short(one["record"]), one["cause"]) for one in bad[:NUM_BAD_SHOWN]]
    if len(bad) > NUM_BAD_SHOWN:
        causes.append((f"and {len(bad) - NUM_BAD_SHOWN:,} more", "see bad_samples.jsonl"))
    body = f"""{facts(figures)}
<p>{escape(filling(summary).capitalize())}.</p>
<h2>Sources</h2>{table(SOURCE_COLUMNS, source_rows(summary))}
<h2>Columns</h2>{table(("source", "columns", "not read"), column_rows(summary), "text")}
<h2>Tokens per sample</h2>{histogram(tokens["counts"], tokens["edges"], "tokens of a sample", "samples")}
<h2>Sizes</h2>{table(["", *columns], sizes)}
<h2>The first {len(shown)} samples</h2>
<p>As the model sees them: each image at the size it is given, with the grid of its image tokens;
<span class="image">image tokens</span>, <span class="prompt">what is given</span>,
<span class="label">what is to be learned</span>. Questions that share an image share its tokens.</p>
<div class="samples">{"".join(_sample(name, sample, processor) for name, sample in shown)}</div>
<h2>Bad samples</h2>{table(("where", "why"), causes, "text") if causes else "<p>None.</p>"}"""
    # names may hold half a surrogate pair, which no file does
    path.write_text(page("What training will read", body, STYLE), encoding="utf-8", errors="backslashreplace")


def source_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row of `SOURCE_COLUMNS` for each source of a summary."""
    return [
        (
            _short(one["name"]),
            f"{one['num_rows']:,}",
            f"{one['num_bad']:,}",
            f"{100 * one['share_of_samples']:.1f} %",
            f"{100 * one['share_of_tokens']:.1f} %",
            f"{one['mean_tokens'] or 0:,.0f}",
        )
        for one in summary["sources"]
    ]


def column_rows(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(source, its columns as we call them, those that are not read) of each source of a summary."""

    def said(ours: str, theirs: str, guessed: Sequence[str]) -> str:
        return (ours if ours == theirs else f"{ours} from {theirs}") + (" (guessed)" if ours in guessed else "")

    return [
        (
            _short(one["name"]),
            ", ".join(said(ours, theirs, one["guessed_columns"]) for ours, theirs in one["columns"].items()),
            ", ".join(one["columns_not_read"]) or "none",
        )
        for one in summary["sources"]
    ]


def filling(summary: Mapping[str, Any]) -> str:
    """How full packed sequences get, and which length near theirs fills better."""
    length, best = summary["sequence_length"], summary["best_sequence_length"]
    share, most = (100 * one["packing_efficiency"] for one in (summary, best))
    said = f"packed sequences of {length:,} tokens are {share:.1f} % full"
    if best["sequence_length"] == length:
        return said
    other = best["sequence_length"]
    return f"{said}; of {other:,} they would be {most:.1f} % full: data.sequence_length={other}, or auto"


def token_runs(sample: TokenSample, tokenizer: Any, image_token_id: int) -> list[list[tuple[str, str]]]:
    """The conversations of a sample as runs of tokens: a list per conversation of (kind, text).

    Kinds: `image` with its number of tokens, `prompt`, and `label`: tokens that the place before each has to predict.
    """
    ids, targets, until = sample["input_ids"], sample["targets"], sample["seen_until"]
    conversations = []
    for end in sample["ends"]:
        path = np.flatnonzero((np.arange(len(ids)) <= end) & (until >= end))
        aims = [-100, *targets[path].tolist()]  # of each token, what the place before it predicts
        tokens = [*ids[path].tolist(), *(aims[-1:] if aims[-1] != -100 else [])]
        kinds = ["prompt" if aim == -100 else "label" for aim in aims]
        kinds = ["image" if token == image_token_id else kind for token, kind in zip(tokens, kinds)]
        runs: list[tuple[str, str]] = []
        for kind, run in groupby(zip(kinds, tokens), key=lambda pair: pair[0]):
            found = [token for _, token in run]
            runs.append((kind, f"[{len(found)} image tokens]" if kind == "image" else tokenizer.decode(found)))
        conversations.append(runs)
    return conversations


def _sample(name: str, sample: TokenSample, processor: Any) -> str:
    images, first, image_processor = [], 0, processor.image_processor
    for frames, rows, columns in sample.get("image_grid_thw", np.zeros((0, 3), int)).tolist():
        for _ in range(frames):
            patches = sample["pixel_values"][first : first + rows * columns]
            first += rows * columns
            image = image_of_patches(patches, rows, columns, image_processor)
            shown = with_grid(image, image_processor.patch_size * image_processor.patch_merge)
            images.append(f'<img alt="" src="{data_url(shown)}">')
    texts = [
        "".join(f'<span class="{kind}">{escape(text)}</span>' for kind, text in runs)
        for runs in token_runs(sample, processor.tokenizer, processor.image_token_id)
    ]
    return (
        f'<div class="sample"><div class="name">{escape(_short(name))}: {len(sample["input_ids"])} tokens</div>'
        f'{"".join(images)}<div class="texts">{"".join(f"<p>{text}</p>" for text in texts)}</div></div>'
    )


def _short(name: str) -> str:
    """A name without the folder that the command ran in."""
    return name.removeprefix(f"{Path.cwd()}/")
