"""The quickstart's report: one HTML page that needs nothing beside it."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from vora.data.schema import Sample
from vora.model.processing_vora import VoraProcessor
from vora.report.html import facts, page, remark
from vora.report.images import data_url
from vora.report.plots import figure_url, losses_figure, new_figure
from vora.serve.chat import Chat
from vora.serve.engine import Engine
from vora.train.run_log import read_log

NUM_QUESTIONS = 4  # shown of each image
SIZE = (9, 3.4)  # of plots, in inches
STYLE = """
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:1rem}
.card{border:1px solid #d8e0e8;border-radius:.6rem;padding:.8rem;display:flex;gap:.8rem}
.card img{width:96px;height:96px;image-rendering:pixelated;border:1px solid #d8e0e8;flex:none}
.card p{margin:0 0 .35rem;font-size:.86rem;line-height:1.3}.right{color:#157347}.wrong{color:#b02a37}
"""


def write_report(
    out: Path, result: Mapping[str, Any], shown: Sequence[Sample], model: PreTrainedModel, processor: VoraProcessor
) -> None:
    """Write `out`/report.html, on which the model answers questions about the samples `shown`."""
    log = read_log(out / "run" / "log.jsonl")
    figures = [
        (f"{100 * result['accuracy']:.1f} %", f"of {result['num_test_questions']:,} test questions right"),
        (f"{100 * result['text_only_accuracy']:.1f} %", "for the text-only baseline"),
        (f"{result['train_seconds'] / 60:.1f} min", f"of training, {result['num_samples_seen']:,} samples"),
        (f"{result['peak_rss_bytes'] / 1e9:.1f} GB", "peak memory"),
    ]
    kinds = result["accuracy_by_answer"].items()
    by_answer = ", ".join(f"{kind} questions {100 * share:.1f} %" for kind, share in kinds)
    losses = losses_figure(log, {"lm_loss": "lm_loss (answers)", "distill_loss": "distill_loss (teacher)"}, SIZE)
    engine = Engine(model, processor)
    body = f"""<p>{escape(result["llm"])}, without a vision encoder: vision LoRA and a patch embedding were trained,
then merged. What remains is the LLM's own architecture.</p>
{remark(f"This model knows only the answers of its task: {result['warning']}") if result["warning"] else ""}
{facts(figures)}
<p>By kind: {by_answer}. The text-only baseline is the better of two: the merged model with blank images
({100 * result["blank_image_accuracy"]:.1f} %), and the most frequent training answer to the same question
({100 * result["majority_accuracy"]:.1f} %).</p>
<h2>Images it had never seen</h2><div class="cards">{"".join(card(sample, engine) for sample in shown)}</div>
<h2>How it learned</h2><div class="wide"><img alt="losses" src="{figure_url(losses)}"></div>
{imitation(log)}
<h2>What to try next</h2>
<pre>vora chat {escape(shown[0].name)} -m {escape(str(out / "model"))}
vora train {escape(str(out / "run" / "recipe.yaml"))} --out longer training.max_steps=1000
vora merge longer -o longer-model --llm-out longer-llm</pre>
<p>Your own images: give <code>data.sources</code> of the recipe a Parquet or JSON Lines file with
<code>image</code>, <code>question</code> and <code>answer</code>. Your own LLM: <code>model.llm</code> takes a folder
or a hub id. A larger teacher: <code>teacher.name</code> takes any plain ViT.</p>"""
    (out / "report.html").write_text(page("An LLM that learned to see", body, STYLE), encoding="utf-8")


def card(sample: Sample, engine: Engine) -> str:
    """An image with its first questions, the answers of the model, and those expected where they differ."""
    image, rows = sample.open_images()[0], []
    assert isinstance(image, Image.Image)  # no video
    for conversation in sample.conversations[:NUM_QUESTIONS]:
        question, expected = (message["content"] for message in conversation)
        answer = "".join(Chat(engine, max_new_tokens=8).ask(question, [image])).strip()
        note, style = ("", "right") if answer == expected else (f" (expected {escape(expected)})", "wrong")
        rows.append(f'<p>{escape(question)}<br><b class="{style}">{escape(answer)}</b>{note}</p>')
    return f'<div class="card"><img alt="" src="{data_url(image, "png")}"><div>{"".join(rows)}</div></div>'


def imitation(log: Sequence[Mapping[str, Any]]) -> str:
    """A plot of the distillation losses of all pairs of blocks against samples seen; nothing without a teacher."""
    names = [name for name in log[-1] if name.startswith("pair_")]
    if not names:
        return ""
    figure, axes = new_figure(*SIZE)
    losses = [[line[name] for line in log if name in line] for name in names]
    seen = [line["samples_seen"] for line in log if names[0] in line]
    mesh = axes.pcolormesh(seen, range(len(names)), losses, cmap="viridis_r", vmin=0, vmax=1, shading="nearest")
    labels = ["block {} as teacher's {}".format(*(int(i) + 1 for i in name.split("_")[1:])) for name in names]
    axes.set(xlabel="samples seen", yticks=range(len(names)), yticklabels=labels)
    figure.colorbar(mesh, label="1 - cosine")
    return f"""<h2>How far each block follows its teacher</h2>
<p>1 - cosine between what a student block says of each patch and what the teacher's block says, the teacher's mean
subtracted: 0 is perfect imitation, 1 is chance.</p>
<div class="wide"><img alt="distillation by block" src="{figure_url(figure)}"></div>"""
