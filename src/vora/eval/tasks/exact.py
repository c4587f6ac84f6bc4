"""Which answers a greedy model gives word for word, read off one pass per image: far faster than letting it speak."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from PIL import Image

from vora.data.schema import Sample
from vora.eval.evaluation import Evaluation, Job
from vora.eval.metrics.intervals import interval_of, ratio, share
from vora.eval.probe.conditions import image_groups_of
from vora.eval.probe.probe import most_common, read_requests
from vora.eval.probe.requests import ImageCondition
from vora.eval.probe.scores import drawn_together
from vora.eval.report import Report
from vora.eval.rows import Data, Rows
from vora.eval.tasks.evaluation import check_has_example, conditions_of, examples_of
from vora.eval.tasks.vqa import Vqa

BLANK = "blank"


@dataclass
class ExactAnswers(Evaluation):
    """Share of questions that are answered exactly, yes/no questions also apart from the others; and what the same
    model scores when every image is white, where each distinct question is asked once."""

    task: Vqa
    name = "exact"

    def check_data(self, data: Data) -> None:
        check_has_example(self.task, data)

    def run(self, job: Job) -> Report:
        rows = Rows(job.data)
        found = examples_of(self.task, rows, job.skipped)
        conditions = conditions_of(self.task, found, job, rows.files) | {"task": self.name}
        examples, groups = image_groups_of(found, job.skipped)
        if not examples:
            raise ValueError(f"No image of {job.data} can be read.{job.skipped.first()}")
        answers = [[most_common(example.references)] for example in examples]
        pairs = [(example.prompt, wanted) for example, (wanted,) in zip(examples, answers)]
        first: dict[tuple[str, str], int] = {}
        for number, pair in enumerate(pairs):
            first.setdefault(pair, number)
        shown = [ImageCondition(one.key, one.images, [(n, 0, "right") for n in one.examples]) for one in groups]
        white = Image.new("RGB", examples[0].images()[0].size, "white")
        shown.append(ImageCondition(BLANK, lambda: [white], [(number, 0, BLANK) for number in first.values()]))
        shown = [part for whole in shown for part in whole.parts()]
        cache = job.open_cache(conditions, len(shown))
        read_requests(job, shown, examples, answers, cache)
        right, right_blank = np.zeros(len(examples)), {}
        for line in cache.done.values():
            for (number, _, condition), is_right in zip(line["requests"], line["right"]):
                if condition == BLANK:
                    right_blank[pairs[number]] = float(is_right)
                else:
                    right[number] = is_right
        drawn, seed = drawn_together(examples, groups), self.task.seed
        is_choice = np.array([wanted in ("yes", "no") for _, wanted in pairs])
        metrics = {"accuracy": share(right, drawn, seed)}
        if 0 < is_choice.sum() < len(pairs):
            for kind, which in (("yes_no", is_choice), ("other", ~is_choice)):
                metrics[f"accuracy_{kind}"] = interval_of(ratio, np.stack([right * which, which], 1), drawn, seed)
        metrics["accuracy_with_blank"] = share([right_blank[pair] for pair in pairs], drawn, seed)
        return job.report(len(examples), metrics, conditions, cache, rows.files, num_images=len(groups))


def majority_accuracy(train_records: Sequence[Sample], test_records: Sequence[Sample]) -> float:
    """What guessing the most frequent training answer to the same question scores."""
    train, test = (
        [(asked["content"], said["content"]) for n in range(len(records)) for asked, said in records[n].conversations]
        for records in (train_records, test_records)
    )
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in train:
        seen[question][answer] += 1
    overall = Counter(answer for _, answer in train)
    return fmean(seen.get(question, overall).most_common(1)[0][0] == answer for question, answer in test)
