"""Parts of pages: what they hold is escaped, images come back as they were, tables are whole."""

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from vora.model.image_processing_vora import VoraImageProcessor
from vora.report import html, markdown
from vora.report.images import data_url, image_of_patches, with_grid
from vora.report.plots import figure_url, losses_figure, run_figure, save_figure
from vora.train.run_log import draw_losses

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (12, 20, 3), np.uint8))


def opened(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.rpartition(",")[2]))))


def test_pages_escape_what_they_hold():
    page = html.page("a < b", html.facts([("1 < 2", "x & y")]) + html.table(["<h>"], [["<i>"], [3]], "kind"), ".x{}")
    assert "a &lt; b" in page and "1 &lt; 2" in page and "x &amp; y" in page and ".x{}" in page
    rows = "<tr><th>&lt;h&gt;</th></tr><tr><td>&lt;i&gt;</td></tr><tr><td>3</td></tr>"
    assert f'<table class="kind">{rows}</table>' in page and 'name="viewport" content="width=device-width' in page


def test_what_is_long_wraps_scrolls_or_is_folded():
    page = html.page(
        "a", html.remark("1 < 2") + html.folded("<b>more</b>", "<p>all</p>") + html.folded("s", "b", True)
    )
    assert '<p class="remark">1 &lt; 2</p>' in page and "<details open><summary>s</summary>b</details>" in page
    assert "<details><summary><b>more</b></summary><p>all</p></details>" in page
    assert re.search(r"pre\{[^}]*white-space:pre-wrap;overflow-wrap:anywhere", page)


def test_a_histogram_has_a_bar_for_each_count():
    found = html.histogram([1, 4, 2], [0, 10, 20, 30], width=300, height=100)
    assert found.count("<rect") == 3 and 'height="100.0" fill="#4a7fb5"><title>4' in found and ">30</text>" in found
    assert all(f">{tick}</text>" in found for tick in range(5)) and html.ticks(37) == [0, 10, 20, 30]
    assert ">tokens</text>" in html.histogram([1], [0, 1], "tokens") and len(html.ticks(1_000_000)) <= 6
    assert html.histogram([], []) == html.histogram([0], [0, 1]) == "<p>None.</p>"


def test_images_come_back_whole_and_grids_mark_their_cells():
    processor = VoraImageProcessor(patch_size=4)
    found = np.asarray(image_of_patches(processor.patchify(NOISE, 3, 5), 3, 5, processor), int)
    assert np.abs(found - np.asarray(NOISE, int)).max() <= 1
    assert np.array_equal(opened(data_url(NOISE, "png")), np.asarray(NOISE))
    shown = np.asarray(with_grid(Image.new("RGB", (8, 8)), 4, side=16))
    assert shown.shape == (16, 16, 3) and shown[0, 8].min() > 100 and shown[8, 0].min() > 100
    assert not shown[1:7, 1:7].any()


def test_losses_are_drawn_where_they_are_logged(tmp_path):
    log = [{"samples_seen": 1, "lm_loss": 2.0}, {"samples_seen": 2, "lm_loss": 1.0, "other": 3.0}]
    figure = losses_figure(log, {"lm_loss": "answers", "distill_loss": "teacher"}, (4, 2))
    (line,) = figure.axes[0].lines
    assert line.get_label() == "answers" and line.get_xydata().tolist() == [[1, 2], [2, 1]]
    save_figure(figure, tmp_path / "a.png", dpi=50)
    assert Image.open(tmp_path / "a.png").size == (200, 100) and opened(figure_url(figure, 50)).shape[:2] == (100, 200)
    save_figure(losses_figure([], {"lm_loss": "answers"}, (4, 2)), tmp_path / "b.png")


def test_whether_a_run_looks_is_drawn_below_its_losses():
    log = [{"samples_seen": seen, "eval_loss": 2.0, "looks": 0.5 + seen / 10} for seen in (1, 2)]
    both = run_figure([*log, {"samples_seen": 1, "loss": 2.5}], {"loss": "a", "eval_loss": "b"}, {}).axes[0].lines
    assert both[0].get_color() == both[1].get_color()
    losses, shares = run_figure(log, {"eval_loss": "validation"}, {"looks": "right_beats_other"}).axes
    assert [line.get_label() for line in losses.lines] == ["validation"]
    chance, looks = shares.lines
    assert chance.get_label() == "chance" and looks.get_xydata().tolist() == [[1, 0.6], [2, 0.7]]
    assert len(run_figure(log, {"eval_loss": "validation"}, {"no": "no"}).axes) == 1


def test_markdown_tables():
    assert markdown.table(["a", "b", "c"], [[1, 2, 3]], "lr") == "| a | b | c |\n| --- | ---: | ---: |\n| 1 | 2 | 3 |"


def test_a_sum_of_losses_is_drawn_where_validation_has_one_and_it_is_of_all_losses(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vora.train.run_log.save_figure", lambda figure, file: drawn.append(figure.axes[0].lines))
    alone, both = (
        {"samples_seen": 1, "loss": 0.9, "distill_loss": 0.9},
        {"samples_seen": 2, "loss": 3.0, "lm_loss": 2.5},
    )
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (alone, both)))
    draw_losses(tmp_path)
    (tmp_path / "validation.jsonl").write_text(json.dumps({"samples_seen": 2, "eval_loss": 3.1}) + "\n")
    draw_losses(tmp_path)
    without, lines = ({line.get_label(): line.get_xydata().tolist() for line in found} for found in drawn)
    assert without == {"lm_loss": [[2, 2.5]], "distill_loss": [[1, 0.9]]}
    assert lines == without | {"loss": [[2, 3.0]], "loss, validation": [[2, 3.1]]}  # no 0.9 of one loss alone
