"""Does it look? A model that cannot, one that does, and what stands in for an image."""

import numpy as np
import pytest
from messages import noise
from PIL import Image
from tiny import log_prob_of_answer

import vora
from vora.checkpoint import load_model
from vora.eval.probe import conditions
from vora.eval.probe import probe as probing
from vora.eval.probe.conditions import CONDITIONS, image_groups_of, num_alike, other_groups
from vora.eval.probe.figure import draw_probe
from vora.eval.probe.requests import examples_under
from vora.eval.probe.scores import ProbeScores, probe_metrics
from vora.eval.probe.verdict import verdict_of
from vora.eval.rows import Data, Example, Rows, SkippedRows
from vora.eval.scoring.teacher_forced import AnswerScore
from vora.eval.tasks.evaluation import TASKS, task_of
from vora.model.patch_embed import PatchEmbedding

COUNT = 14


@pytest.mark.parametrize("task", ["vqa", "classify"])  # one whose answers are read, one where they are chosen
def test_a_model_that_ignores_images_does_not_look(task, task_data, report_of, tmp_path, monkeypatch):
    seen = PatchEmbedding.forward  # every image of one grid becomes the same tokens
    monkeypatch.setattr(PatchEmbedding, "forward", lambda self, pixels, grid: seen(self, 0 * pixels, grid))
    report = report_of("probe", task_data / f"{task}.parquet")
    assert report["task"] == "probe" and report["of"] == task and report["num_examples"] >= COUNT
    assert report["looks"] is False and report["verdict"].startswith("It does not look")
    metrics = report["metrics"]
    for condition in ("other", "blank", "shuffled"):
        assert metrics[f"gain_over_{condition}"]["value"] == pytest.approx(0, abs=1e-4)
        assert metrics[f"right_beats_{condition}"]["value"] == 0.5
    assert metrics["log_likelihood_with_none"]["value"] != metrics["log_likelihood_with_right"]["value"]
    assert (tmp_path / report["image"]).stat().st_size > 10_000
    assert metrics["accuracy_drop_other"] == {"value": 0.0, "interval": [0.0, 0.0]}


@pytest.mark.parametrize("task", ["captions", "statements"])
def test_what_is_read_together_is_what_is_read_alone(task, task_data, model_folder, report_of):
    options = "probe", task_data / f"{task}.parquet", "--max-samples", 6
    metrics = report_of(*options)["metrics"]
    # many requests share an image; each is held against a pass of its own
    model, processor = load_model(str(model_folder))
    rows = Rows(Data([task_data / f"{task}.parquet"]))
    examples, groups = image_groups_of(TASKS[task](max_samples=6).examples(rows, SkippedRows()), SkippedRows())
    substitutes = conditions.Substitutes(groups, other_groups(groups), processor.image_processor)
    under = examples_under(CONDITIONS, examples, substitutes)
    for place, condition in enumerate(CONDITIONS):
        asked = [(one, text) for one in under[place * 6 : place * 6 + 6] for text in one.references]
        wanted = [log_prob_of_answer(model, processor, *pair) for pair in asked]
        assert metrics[f"log_likelihood_with_{condition}"]["value"] == pytest.approx(np.mean(wanted), abs=1e-4)
    assert metrics["gain_over_other"]["value"] != 0
    part = report_of(*options, "--against", "other", name="p")["metrics"]  # another image may be all that is shown
    assert part.keys() == {name for name in metrics if not any(one in name for one in ("blank", "shuffled", "none"))}
    for name, found in part.items():
        assert found["value"] == pytest.approx(metrics[name]["value"], abs=1e-4)


def test_an_oracle_looks(task_data, report_of, monkeypatch):
    """One that knows which captions belong to which pixels."""
    truth = {noise((12, 8), n).tobytes(): [f"a dog number {n}", f"the {n} is red"] for n in range(COUNT)}

    def oracle(model, processor, records):
        for index, record in records:
            known = truth.get(record.images[0].tobytes(), []) if record.images else []
            answers = [conversation[-1]["content"] for conversation in record.conversations]
            log_probs = np.array([-1.0 if text in known else -9.0 for text in answers])
            yield {index: AnswerScore(log_probs, np.full(len(answers), 4), [False] * len(answers))}

    monkeypatch.setattr(probing, "score_answers", oracle)
    report = report_of("probe", task_data / "captions.parquet")
    assert report["looks"] is True and report["verdict"].startswith("It looks: ")
    assert report["num_references"] == 2 * COUNT and report["num_images"] == COUNT
    for condition in CONDITIONS[1:]:
        assert report["metrics"][f"gain_over_{condition}"] == {"value": 8.0, "interval": [8.0, 8.0]}
        assert report["metrics"][f"gain_over_{condition}_per_token"]["value"] == 2.0
    low, high = report["metrics"]["right_beats_other"]["interval"]
    assert 0.7 < low < high == 1.0  # all of 14 images are not all images


def test_another_image_is_never_the_same_nor_known_to_be_as_right():
    # each image in two rows, with two labels
    examples = [Example(f"{n}", "what?", [str(n % 4)], lambda n=n: [noise((12, 8), n // 2)], n) for n in range(40)]
    kept, groups = image_groups_of(examples, SkippedRows())
    assert len(kept) == 40 and len(groups) == 20 and groups[0].examples == [0, 1]
    others = other_groups(groups)
    assert sorted(others) == list(range(20)) and all(number != other for number, other in enumerate(others))
    assert num_alike(groups, others) == 0
    assert others == other_groups(groups) != other_groups(groups, 1)


def test_what_is_alike_or_broken_is_counted():
    def broken():
        raise ValueError("no image")

    skipped = SkippedRows()
    examples = [Example("a", "?", ["x"], broken, 0)]
    examples += [Example(f"{n}", "what?", ["x"], lambda n=n: [noise((12, 8), n)], n) for n in range(5)]
    kept, groups = image_groups_of(examples, skipped)
    assert kept == examples[1:] and skipped.named[0]["name"] == "a" and groups[0].examples == [0]
    others = other_groups(groups)
    assert num_alike(groups, others) == 5 and all(number != other for number, other in enumerate(others))
    with pytest.raises(ValueError, match="at least 2 different images"):
        other_groups(groups[:1])


@pytest.mark.parametrize(("merge", "square"), [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("size", [(12, 8), (37, 50), (90, 11)])
def test_shuffled_patches_are_the_same_pixels_and_a_blank_image_their_mean(merge, square, size):
    image_processor = vora.VoraImageProcessor(
        patch_size=4, patch_merge=merge, min_image_tokens=4, max_image_tokens=30, pad_to_square=square
    )
    image = noise(size)
    right, mixed, flat = (
        image_processor.preprocess(one, return_tensors="np")
        for one in (image, conditions.shuffled(image, image_processor, 7), conditions.blank(image))
    )
    assert np.array_equal(right["image_grid_thw"], mixed["image_grid_thw"])
    assert np.array_equal(right["image_grid_thw"], flat["image_grid_thw"])
    before, after = (sorted(map(bytes, one["pixel_values"])) for one in (right, mixed))
    assert before == after and not np.array_equal(right["pixel_values"], mixed["pixel_values"])
    two = Image.new("RGB", (4, 2), (10, 20, 30))
    two.paste((50, 20, 30), (0, 0, 2, 2))
    assert conditions.blank(two).getcolors() == [(8, (30, 20, 30))]  # the mean, at all of the image's pixels


def scores_of(gains, groups):
    log_probs = {condition: -np.asarray(gains, float) * (condition != "right") for condition in CONDITIONS}
    return ProbeScores(np.arange(len(gains)), log_probs, np.full(len(gains), 2), {}, groups)


@pytest.mark.parametrize(
    ("share", "count", "looks", "words"),
    [
        (0.9, 200, True, "It looks: "),
        (0.57, 600, True, "It looks, but little"),
        (0.5, 300, False, "It does not look"),
        (0.2, 200, False, "It does not look"),
        (0.6, 30, None, "Too few examples"),
        (1.0, 9, None, "Too few examples"),
    ],
)
def test_the_verdict_follows_its_rule(share, count, looks, words):
    gains = np.where(np.arange(count) < round(share * count), 1.0, -1.0)
    metrics = probe_metrics(scores_of(gains, list(range(count))))
    found, verdict = verdict_of(metrics, [], count, count)
    assert found is looks and verdict.startswith(words)


def test_columns_of_two_tasks_tell_none(parquet):
    with pytest.raises(ValueError, match="captions or classify: say which with --of"):
        task_of(Rows(Data([parquet("both", [{"captions": ["a"], "label": "b"}])])))


def test_captions_in_rows_of_their_own_are_probed_by_image_and_the_model_may_speak(
    png, parquet, report_of, tmp_path, capsys
):
    rows = [{"image": png(n % 2), "caption": f"a dog number {n}"} for n in range(4)]
    report = report_of("probe", parquet("rows", rows), "--generate")
    assert report["num_examples"] == report["num_images"] == 2 and report["num_references"] == 4
    assert report["looks"] is None and report["verdict"].startswith("Too few examples to tell")
    assert {"cider_d_with_none", "cider_d_drop_other"} < report["metrics"].keys()
    assert (tmp_path / "r.generated.jsonl").exists() and len(report["predicted_at"]) == 1
    files = ", ".join(str(tmp_path / f"r.{end}") for end in ("json", "predictions.jsonl", "generated.jsonl", "png"))
    assert f"Wrote {files}\n" in capsys.readouterr().err


def test_a_figure_is_drawn_of_one_group(tmp_path):
    found = scores_of([1.0, -1.0], [0, 0])
    metrics = probe_metrics(found)
    assert metrics["gain_over_other"]["interval"] == [None, None]
    _, verdict = verdict_of(metrics, [], 1, 2)
    assert "(-), which is 1 times as likely." in verdict  # a gain of 1 and of -1
    assert "to tell (1 independent images: some 200 would tell)" in verdict and "nats on average (-)" in verdict
    draw_probe(tmp_path / "p.png", metrics, found, verdict, "x")
    assert (tmp_path / "p.png").exists()
