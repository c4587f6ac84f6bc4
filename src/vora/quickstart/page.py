"""The quickstart's report: one HTML page that needs nothing beside it."""

import base64
import html
from io import BytesIO

from vora.report.images import data_url
from vora.serve.engine import Chat
from vora.train.run_log import read_log

NUM_QUESTIONS = 4

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1c2733}
h1{margin-bottom:.2rem}h2{margin-top:2.5rem}
.figures{display:flex;gap:1rem;flex-wrap:wrap}.figures div{background:#f2f5f8;border-radius:.6rem;padding:.8rem 1.2rem}
.figures b{display:block;font-size:1.7rem}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:1rem}
.card{border:1px solid #d8e0e8;border-radius:.6rem;padding:.8rem;display:flex;gap:.8rem}
.card img{width:96px;height:96px;image-rendering:pixelated;border:1px solid #d8e0e8;flex:none}
.card p{margin:0 0 .35rem;font-size:.86rem;line-height:1.3}.right{color:#157347}.wrong{color:#b02a37}
img.plot{max-width:100%}pre{background:#f2f5f8;padding:1rem;border-radius:.6rem;overflow-x:auto}
"""


def write_html(out, result, shown, model, processor):
    """Write `out`/report.html.

    Args:
        result: what goes into result.json.
        shown: list of (record, [right or not per question]).
    """
    lines = read_log(out / "run" / "log.jsonl")
    figures = [
        (f"{100 * result['accuracy']:.1f} %", f"of {result['num_test_questions']:,} test questions right"),
        (f"{100 * result['text_only_accuracy']:.1f} %", "for a blind model"),
        (f"{result['train_seconds'] / 60:.1f} min", f"of training, {result['num_samples_seen']:,} samples"),
        (f"{result['peak_rss_bytes'] / 1e9:.1f} GB", "peak memory"),
    ]
    by_answer = ", ".join(
        f"{kind} questions {100 * share:.1f} %" for kind, share in result["accuracy_by_answer"].items()
    )
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>VoRA quickstart</title>
<style>{STYLE}</style>
<h1>An LLM that learned to see</h1>
<p>{html.escape(result["llm"])}, without a vision encoder: vision LoRA and a patch embedding were trained, then merged.
What remains is the LLM's own architecture.</p>
<div class="figures">{"".join(f"<div><b>{figure}</b>{text}</div>" for figure, text in figures)}</div>
<p>By kind: {by_answer}. Blind is the better of two: the merged model with blank images
({100 * result["blank_image_accuracy"]:.1f} %), and the most frequent training answer to the same question
({100 * result["majority_accuracy"]:.1f} %).</p>
<h2>Images it had never seen</h2><div class="cards">{"".join(_card(*pair, model, processor) for pair in shown)}</div>
<h2>How it learned</h2><img class="plot" alt="losses" src="{_plot_losses(lines)}">
<h2>How far each block follows its teacher</h2>
<p>1 - cosine between what a student block says of each patch and what the teacher's block says, the teacher's mean
subtracted: 0 is perfect imitation, 1 is chance.</p>
<img class="plot" alt="distillation by block" src="{_plot_pairs(lines)}">
<h2>What to try next</h2>
<pre>vora chat {html.escape(str(shown[0][0].images[0]))} -m {html.escape(str(out / "model"))}
vora train {html.escape(str(out / "run" / "recipe.yaml"))} --out longer training.max_steps=1000
vora merge longer -o longer-model --llm-out longer-llm</pre>
<p>Your own images: give <code>data.sources</code> of the recipe a Parquet or JSON Lines file with
<code>image</code>, <code>question</code> and <code>answer</code>. Your own LLM: <code>model.llm</code> takes a folder
or a hub id. A larger teacher: <code>teacher.name</code> takes any plain ViT.</p></html>"""
    (out / "report.html").write_text(page, encoding="utf-8")


def _card(record, right, model, processor):
    image = record.open_images()[0]
    rows = []
    for conversation, ok in list(zip(record.conversations, right))[:NUM_QUESTIONS]:
        question, expected = (message["content"] for message in conversation)
        answer = "".join(Chat(model, processor, max_new_tokens=8).ask(question, [image])).strip()
        note = "" if ok else f" (expected {html.escape(expected)})"
        style = "right" if ok else "wrong"
        rows.append(f'<p>{html.escape(question)}<br><b class="{style}">{html.escape(answer)}</b>{note}</p>')
    return f'<div class="card"><img alt="" src="{data_url(image, "png")}"><div>{"".join(rows)}</div></div>'


def _plot_losses(lines):
    figure, axes = _figure(1)
    for name, label in [("lm_loss", "lm_loss (answers)"), ("distill_loss", "distill_loss (teacher)")]:
        points = [(line["samples_seen"], line[name]) for line in lines if name in line]
        axes.plot(*zip(*points), label=label)
    axes.set(xlabel="samples seen", ylabel="loss", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    return _figure_url(figure)


def _plot_pairs(lines):
    names = [name for name in lines[-1] if name.startswith("pair_")]
    figure, axes = _figure(1)
    table = [[line[name] for line in lines if name in line] for name in names]
    seen = [line["samples_seen"] for line in lines if names[0] in line]
    mesh = axes.pcolormesh(seen, range(len(names)), table, cmap="viridis_r", vmin=0, vmax=1, shading="nearest")
    labels = ["block {} as teacher's {}".format(*(int(i) + 1 for i in name.split("_")[1:])) for name in names]
    axes.set(xlabel="samples seen", yticks=range(len(names)), yticklabels=labels)
    figure.colorbar(mesh, label="1 - cosine")
    return _figure_url(figure)


def _figure(rows):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(rows, figsize=(9, 3.4 * rows), layout="constrained")


def _figure_url(figure):
    import matplotlib.pyplot as plt

    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
