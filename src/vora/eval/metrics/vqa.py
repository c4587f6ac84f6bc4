"""Answers to questions held against people's, as VQA is scored (Antol et al. 2015).

Answers are compared after the normalisation of the official evaluation: lower case, no punctuation (a decimal point
stays), no articles, numbers up to ten as digits, contractions with their apostrophe. Here it is applied to every
answer; the official code leaves alone those to which all people said the same. An underscore counts as a space. Where
nothing would be left, as of the answers "A" and "?", it stays in lower case; and an answer of nothing is never right.
"""

import re
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"a", "an", "the"}
NUMBERS = {
    word: str(number)
    for number, word in enumerate("zero one two three four five six seven eight nine ten".split())
} | {"none": "0"}  # fmt: skip
CONTRACTIONS = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd how's I'd've I'm I've "
    "isn't it'd it'll let's ma'am mightn't might've mustn't must've needn't oughtn't o'clock shan't she's should've "
    "shouldn't somebody's someone's something's that's there'd there're there's they'd they'll they're they've wasn't "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'll who's who've why're "
    "why's won't would've wouldn't y'all you'd you'll you're you've"
).split()
WITH_APOSTROPHE = {word.lower().replace("'", ""): word.lower() for word in CONTRACTIONS}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
THOUSANDS = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")


def normalised(answer: str) -> str:
    """An answer as it is compared."""
    text = " ".join(answer.replace("_", " ").split())
    stripped = text
    for mark in PUNCTUATION:
        # a mark beside a space, and every one in an answer with a number like 1,000, goes; others part words
        alone = f"{mark} " in text or f" {mark}" in text or THOUSANDS.search(text)
        stripped = stripped.replace(mark, "" if alone else " ")
    words = FULL_STOP.sub("", stripped).lower().split()
    words = [word for word in words if word not in ARTICLES] or words or [text.lower()]
    words = [NUMBERS.get(word, word) for word in words]
    return " ".join(WITH_APOSTROPHE.get(word, word) for word in words)


def exact_accuracy(answer: str, references: Sequence[str]) -> float:
    """1.0 if an answer is the one most people gave, else 0.0. Of several items, the order does not count."""
    said, most_frequent = _items(answer), Counter(map(_items, references)).most_common(1)[0][0]
    return float(bool(said) and said == most_frequent)


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """The share of people who gave an answer, three being enough: min(n / 3, 1), on average over all but one of them.

    With fewer than three references, whether it is one of them.
    """
    said = normalised(answer)
    same = [said != "" and normalised(reference) == said for reference in references]
    if len(same) < 3:
        return float(any(same))
    counts = [sum(same) - one for one in same]
    return sum(min(1.0, count / 3) for count in counts) / len(counts)


def _items(answer: str) -> frozenset[str]:
    parts = [answer] if THOUSANDS.search(answer) else answer.split(",")  # `book, carton` in two; `1,000` stays
    return frozenset(item for item in map(normalised, parts) if item)
