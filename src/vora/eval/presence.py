"""Whether an object is in a picture, asked as POPE asks (Li et al. 2023, "Evaluating Object Hallucination").

What is in a picture is told by its captions (words for the 80 objects of COCO), or by its label or list of objects;
rows of one picture tell it together.
For each picture as many absent objects are asked for as present ones, three ways: any (random), those that most
pictures have (popular), and those that are most often seen together with what is there (adversarial).
"""

import random
from collections import Counter, defaultdict

import numpy as np

from vora.data.prompts import PRESENCE_PROMPT, YES_NO, with_article
from vora.data.record import as_list
from vora.eval.caption_scores import words_of
from vora.eval.intervals import interval_of, of_share
from vora.eval.rows import Example
from vora.eval.tasks import Task, class_name, text_of

NUM_PRESENT = 3  # of each picture at most
KINDS = ("random", "popular", "adversarial")

# object: other words for it in captions; plurals are found by themselves
OBJECTS = {
    "person": "man woman boy girl child kid baby toddler lady guy men women children people infant teenager adult "
    "player rider surfer skier snowboarder skateboarder swimmer climber biker cyclist runner crowd couple team",
    "bicycle": "bike bmx", "car": "van jeep suv taxi sedan", "motorcycle": "motorbike dirtbike",
    "airplane": "plane jet aircraft", "bus": "", "train": "locomotive", "truck": "lorry",
    "boat": "ship canoe kayak sailboat raft",
    "traffic light": "stoplight", "fire hydrant": "hydrant", "stop sign": "", "parking meter": "", "bench": "",
    "bird": "duck goose geese seagull pigeon parrot eagle",
    "cat": "kitten kitty",
    "dog": "puppy poodle greyhound retriever terrier collie dalmatian bulldog labrador husky",
    "horse": "pony", "sheep": "lamb", "cow": "cattle calf bull", "elephant": "", "bear": "", "zebra": "",
    "giraffe": "",
    "backpack": "rucksack", "umbrella": "parasol", "handbag": "purse", "tie": "necktie", "suitcase": "luggage",
    "frisbee": "", "ski": "", "snowboard": "", "ball": "football basketball baseball volleyball soccer", "kite": "",
    "baseball bat": "", "baseball glove": "", "skateboard": "", "surfboard": "",
    "tennis racket": "racquet racket", "bottle": "",
    "wine glass": "", "cup": "mug", "fork": "", "knife": "", "spoon": "", "bowl": "", "banana": "", "apple": "",
    "sandwich": "", "orange": "", "broccoli": "", "carrot": "", "hot dog": "hotdog", "pizza": "", "donut": "doughnut",
    "cake": "cupcake", "chair": "armchair", "couch": "sofa", "potted plant": "houseplant", "bed": "",
    "table": "desk", "toilet": "", "tv": "television", "laptop": "", "mouse": "", "remote": "", "keyboard": "",
    "cell phone": "cellphone phone", "microwave": "", "oven": "stove", "toaster": "", "sink": "",
    "refrigerator": "fridge",
    "book": "", "clock": "", "vase": "", "scissors": "", "teddy bear": "teddy", "hair drier": "", "toothbrush": "",
}  # fmt: skip
COLOURS = {"orange"}  # which in captions are rarely the thing
NAMES = ("name", "names", "category", "label")  # in annotations of objects
GROUPS = {"couple", "crowd", "team"}  # of what follows "of"


class Presence(Task):
    """Questions such as "Is there a dog in the image?"; the likelier of yes and no is the answer."""

    name, generates, chooses, top = "presence", False, True, None
    default_prompt = PRESENCE_PROMPT

    def examples(self, rows, bad):
        found = {}
        for row in rows.read(bad):
            try:
                present = objects_of(row.values, self.labels)
                picture = row.picture_key() if _tells_one_caption(row.values) else row.number
            except ValueError as error:
                bad.add(row.name, error)
                continue
            found.setdefault(picture, (row, set()))[1].update(present)
        present, examples = [things for _, things in found.values()], []
        for (row, _), questions in zip(found.values(), questions_of(present, self.seed)):
            for number, (thing, answer, kinds) in enumerate(questions):
                prompt, name = self.asked(with_article(thing)), f"{row.name}#{number}"
                examples.append(
                    Example(name, prompt, [answer], row.pictures, row.number, YES_NO, kind=" ".join(kinds))
                )
        if found and not examples:
            raise ValueError(
                f"No question can be made of {len(found)} pictures with {len(set().union(*present))} different "
                "objects in all: what a picture lacks is taken from the others. Give pictures with different objects."
            )
        return examples[: self.max_examples]

    def score_one(self, example, prediction):
        said, wanted = prediction["chosen"] == YES_NO[0], example.references[0] == YES_NO[0]
        return {
            "true_positive": float(said and wanted),
            "false_positive": float(said and not wanted),
            "false_negative": float(wanted and not said),
            "true_negative": float(not said and not wanted),
        }

    def metrics(self, examples, scores):
        """Of each way of asking, and of all; a question that belongs to several ways counts in each."""
        sums = np.array([list(one.values()) for one in scores], float).reshape(len(scores), 4)
        groups = [str(example.group) for example in examples]
        found = {}
        for ending, ways in {"": KINDS, **{f"_{kind}": (kind,) for kind in KINDS}}.items():
            times = [sum(kind in ways for kind in example.kind.split()) for example in examples]
            counted, of_groups = np.repeat(sums, times, axis=0), np.repeat(groups, times)
            if not len(counted):
                continue
            for name, value_of in MEASURES.items():
                found[name + ending] = of_share(interval_of(value_of, counted, of_groups, self.seed), of_groups)
        return found


def _share(numerator, denominator):
    def value_of(sums):
        with np.errstate(divide="ignore", invalid="ignore"):
            return sums @ np.array(numerator, float) / (sums @ np.array(denominator, float))

    return value_of


# of true positives, false positives, false negatives, true negatives
MEASURES = {
    "accuracy": _share([1, 0, 0, 1], [1, 1, 1, 1]),
    "precision": _share([1, 0, 0, 0], [1, 1, 0, 0]),
    "recall": _share([1, 0, 0, 0], [1, 0, 1, 0]),
    "f1": _share([2, 0, 0, 0], [2, 1, 1, 0]),
    "yes_share": _share([1, 1, 0, 0], [1, 1, 1, 1]),
}


def objects_of(values, labels=None):
    """Names of the objects that a row says are in its picture.

    Args:
        labels: names of classes, where the row gives their numbers.

    Raises:
        ValueError: it says nothing about them, or not their names.
    """
    if "objects" in values or "label" in values:
        given = as_list(values.get("objects", values.get("label")))
        names = {class_name(name, labels) for one in given for name in as_list(_named(one))}
        return names - {""}
    captions = values.get("captions", values.get("caption", values.get("text")))
    if captions is None:
        raise ValueError("It has no captions, label or objects that say what is in the picture.")
    return set().union(*(objects_in(text_of(caption, "caption")) for caption in as_list(captions)))


def _tells_one_caption(values):
    """Whether other rows may have the other captions of its picture; only then is its file read to tell."""
    captions = values.get("captions", values.get("caption", values.get("text")))
    return captions is not None and "objects" not in values and "label" not in values and len(as_list(captions)) == 1


def _named(thing):
    """The name or names in an annotation of an object; a name is one."""
    return next((thing[key] for key in NAMES if key in thing), thing) if isinstance(thing, dict) else thing


def objects_in(caption):
    """Names of `OBJECTS` that a caption speaks of."""
    words = words_of(caption)
    found = set()
    place = 0
    while place < len(words):
        if words[place] in GROUPS and words[place + 1 : place + 2] == ["of"]:  # a couple of dogs
            place += 2
            continue
        two = _object_of(" ".join(words[place : place + 2])) if place + 1 < len(words) else None
        if two is not None:  # a hot dog is no dog
            found.add(two)
            place += 2
            continue
        one = _object_of(words[place])
        if one is not None and one not in COLOURS:
            found.add(one)
        place += 1
    return found


def _object_of(word):
    forms = [word, word.removesuffix("s")]
    if word.endswith(("ses", "xes", "zes", "ches", "shes", "oes")):
        forms.append(word[:-2])
    if word.endswith("ies"):
        forms.append(word[:-3] + "y")
    return next((WORDS[form] for form in forms if form in WORDS), None)


WORDS = {word: name for name, others in OBJECTS.items() for word in (name, *others.split())}
WORDS |= {"knives": "knife", "skis": "ski", "mice": "mouse", "puppies": "dog"}


def questions_of(present, seed):
    """Questions about each picture, half of them to be denied in each of the three ways.

    Args:
        present: for each picture, the set of objects in it; how popular they are, and together with what, is counted.

    Returns:
        for each picture a list of (object, yes or no, ways in which this is asked); none where nothing is known to be
        in it.
    """
    often = Counter(thing for things in present for thing in things)
    together = defaultdict(Counter)
    for things in present:
        for thing in things:
            together[thing].update(things - {thing})
    by_number = sorted(often, key=lambda thing: (-often[thing], thing))
    found = []
    for number, things in enumerate(present):
        draw = random.Random(f"{seed} {number}")
        there = draw.sample(sorted(things), min(NUM_PRESENT, len(things)))
        absent = [thing for thing in by_number if thing not in things]
        there = there[: len(absent)]
        near = Counter()
        for thing in things:
            near.update({other: count for other, count in together[thing].items() if other not in things})
        ways = {
            "random": draw.sample(absent, len(there)),
            "popular": absent[: len(there)],
            "adversarial": sorted(near, key=lambda thing: (-near[thing], thing))[: len(there)],
        }
        kinds_of = defaultdict(list)
        for kind, denied in ways.items():
            for yes, no in zip(there, denied):
                kinds_of[yes, YES_NO[0]].append(kind)
                kinds_of[no, YES_NO[1]].append(kind)
        found.append([(thing, answer, tuple(kinds)) for (thing, answer), kinds in kinds_of.items()])
    return found
