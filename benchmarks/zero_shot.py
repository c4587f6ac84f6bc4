"""What the eyes know before any word is learned: the teacher's classifier reads it off the student's summary head.

A run with `teacher.summary` teaches every image token the teacher's CLS token. Where the teacher is a classifier, what
the summary's head says goes through the teacher's own last norm and classifier, among the classes that the data
names. The baseline is the teacher itself, on the same pixels.

    python benchmarks/zero_shot.py --run runs/eyes --data FOLDER/tiny_imagenet/validation-*.parquet
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from rows import arguments, parser_of, report, row
from transformers import AutoModelForImageClassification

from vora.data.packing import collate_rows, image_only, sample_of_record
from vora.data.sources import load_source
from vora.distill.blockwise import SUMMARY
from vora.train.trained import open_run


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="directory of `vora train` with teacher.summary")
    parser.add_argument("--teacher", help="where the recipe's teacher lies now")
    parser.add_argument("--data", required=True, help="pictures with labels, as data.sources takes them")
    parser.add_argument("--count", type=int, default=400, help="pictures, drawn by a fixed seed")
    parser.add_argument("--batch", type=int, default=20)
    args = arguments(parser)
    learner, processor = open_run(args.run, args.teacher)
    if learner.distillation is None or SUMMARY not in learner.distillation.heads:
        parser.error(f"{args.run} has no summary head to read: train with teacher.summary=true.")
    classifier = AutoModelForImageClassification.from_pretrained(learner.teacher.name, dtype=torch.float32).eval()
    source = load_source(args.data)
    places = random.Random(0).sample(range(len(source)), min(args.count, len(source)))
    report([shares_right(learner, processor, classifier, source, places, args.batch)], args.json)


@torch.inference_mode()
def shares_right(learner, processor, classifier, source, places, batch_size):
    """One row: the share of pictures that student and teacher name rightly.

    Raises:
        ValueError: a label of the pictures is no class of the teacher's.
    """
    class_of = classes_by_name(classifier.config.id2label)
    of_all = [source[place].conversations[0][-1]["content"] for place in range(len(source))]
    labels, names = [of_all[place] for place in places], sorted(set(of_all))
    if unknown := sorted({label for label in names if label.lower() not in class_of}):
        raise ValueError(f"{len(unknown)} labels are no class of the teacher's: {', '.join(unknown[:5])}.")
    columns = torch.tensor([class_of[name.lower()] for name in names])
    right = torch.zeros(2)
    for first in range(0, len(places), batch_size):
        records = [source[place] for place in places[first : first + batch_size]]
        wanted = torch.tensor([names.index(label) for label in labels[first : first + batch_size]])
        for which, summaries in enumerate(summaries_of(learner, processor, records)):
            scores = classifier.classifier(classifier.base_model.layernorm(summaries))[:, columns]
            right[which] += (scores.argmax(-1) == wanted).sum()
    student, teacher = (right / len(places)).tolist()
    return row(f"{len(places)} pictures of {len(names)} classes named by the summary", student, teacher, "accuracy")


def summaries_of(learner, processor, records):
    """What the student takes for the teacher's CLS token of each picture, and the token itself: two float[N, D_t].

    The student's is the mean over image tokens. Its length, which a cosine does not teach, is the teacher's.
    """
    samples = [
        image_only(sample_of_record(record, processor, record.conversations[:1]), processor.image_token_id)
        for record in records
    ]
    row_tokens = max(len(sample["input_ids"]) for sample in samples)
    batch = collate_rows([[sample] for sample in samples], row_tokens, 0)
    fed = ("input_ids", "position_ids", "seen_until", "pixel_values", "image_grid_thw")
    with learner.paired_states(True, stop_early=False) as states:
        learner.vora.model(**{name: batch[name] for name in fed}, use_cache=False)
    distillation, is_image = learner.distillation, batch["input_ids"] == processor.image_token_id
    pair = next(pair for pair in distillation.pairs if pair[1] == SUMMARY)
    said = distillation.heads[SUMMARY](states[pair[0]][is_image].float())
    truth = learner.teach(batch["pixel_values"], batch["image_grid_thw"], [SUMMARY])[SUMMARY].float()
    length = distillation.target(pair, truth).norm(dim=-1, keepdim=True)
    said = distillation.features_of(pair, F.normalize(said, dim=-1) * length)
    tokens = is_image.sum(1).tolist()
    return tuple(torch.stack([part.mean(0) for part in what.split(tokens)]) for what in (said, truth))


def classes_by_name(id2label):
    """{each of a class's comma-separated names in small letters: its index}; the first class of a name has it."""
    found = {}
    for index in sorted(id2label):
        for name in id2label[index].split(","):
            found.setdefault(name.strip().lower(), index)
    return found


if __name__ == "__main__":
    main()
