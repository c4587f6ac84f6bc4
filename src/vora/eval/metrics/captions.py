"""CIDEr-D (Vedantam et al. 2015) and BLEU-4 (Papineni et al. 2002) of captions, on the scale of pycocoevalcap.

CIDEr-D of 0.35 is what papers print as 35: the factor of 10 is in it, no other. BLEU-4 lies in [0, 1].
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

Ngrams: TypeAlias = "Counter[tuple[str, ...]]"
Weighted: TypeAlias = tuple[list[dict[tuple[str, ...], float]], list[float], int]

LONGEST, SIGMA, SCALE = 4, 6.0, 10.0  # n-grams up to this; width of the penalty on length, in bigrams

# What Penn Treebank's tokenizer parts, as far as captions have it. Punctuation is found, too, and then left out.
WORDS = re.compile(
    r"""
    \d+(?:[.,:/]\d+)+(?![\w-])                   # 3.5  10,000  3:30
    | (?:[a-z]\.){2,} | \b[a-z]\.(?=\s*[a-z0-9]|\s*") | \b(?:mr|mrs|ms|dr|st|jr|sr|vs|no)\.(?=\s*[a-z0-9,])
    | n't(?!\w) | '(?:s|m|d|re|ve|ll|n')(?!\w)
    | \w+?(?=n't(?!\w)) | o'\w+ | \w+(?:[-/.@]\w+|'(?:clock|er)\b)*
    | -[lr][scr]b- | [&%$\#@+=*<>|~^]
    """,
    re.VERBOSE,
)
PARTED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "lemme": "lem me"}
BRACKETS = {"(": " -lrb- ", ")": " -rrb- ", "[": " -lsb- ", "]": " -rsb- ", "{": " -lcb- ", "}": " -rcb- "}


def words_of(caption: str) -> list[str]:
    """A caption's words as the COCO captions are scored: Penn Treebank tokens, lower case, without punctuation."""
    text = caption.lower().replace("\u2019", "'")
    text = "".join(BRACKETS.get(letter, letter) for letter in text)
    pieces: list[str] = []
    for word in WORDS.findall(text):
        pieces += PARTED.get(word, word).split()
    return pieces


def ngrams_of(words: Sequence[str]) -> list[Ngrams]:
    """[Counter of 1-grams, ..., Counter of 4-grams]."""
    return [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for n in range(1, LONGEST + 1)]


def cider_d(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """CIDEr-D of each caption, one per image: float[N], 0 to 10; their mean is the corpus's. How much an n-gram says
    is counted over these N images: scores of a part of them differ, and one image alone scores 0."""
    wanted = [[ngrams_of(words_of(reference)) for reference in row] for row in references]
    seen_in: Ngrams = Counter()
    for row in wanted:
        seen_in.update({ngram for counts in row for one in counts for ngram in one})
    log_images = math.log(max(1, len(references)))
    log_seen_in = {ngram: math.log(count) for ngram, count in seen_in.items()}

    def weighted(counts: list[Ngrams]) -> Weighted:
        """Per n the n-grams' weights and their norm; and the number of bigrams."""
        vectors = [
            {ngram: count * (log_images - log_seen_in.get(ngram, 0.0)) for ngram, count in one.items()}
            for one in counts
        ]
        norms = [math.sqrt(sum(weight**2 for weight in vector.values())) for vector in vectors]
        return vectors, norms, sum(counts[1].values())

    said = [weighted(ngrams_of(words_of(caption))) for caption in captions]
    scores = [[_similarity(one, weighted(counts)) for counts in row] for one, row in zip(said, wanted)]
    return np.array([float(SCALE * np.mean(row)) for row in scores])


def _similarity(said: Weighted, wanted: Weighted) -> float:
    """Mean over n of clipped cosines, times the penalty on the difference in length."""
    (vectors, norms, length), (others, other_norms, other_length) = said, wanted
    penalty = math.exp(-((length - other_length) ** 2) / (2 * SIGMA**2))
    cosines = [
        sum(min(weight, other[ngram]) * other[ngram] for ngram, weight in vector.items() if ngram in other)
        / (norm * other_norm or 1.0)
        for vector, other, norm, other_norm in zip(vectors, others, norms, other_norms)
    ]
    return penalty * sum(cosines) / LONGEST


def bleu_counts(caption: str, references: Sequence[str]) -> list[int]:
    """The 10 numbers that BLEU sums over a corpus: n-grams found in a reference (n = 1..4, each as often as in that
    which has it most), n-grams (n = 1..4), words, words of the reference nearest in length."""
    words, rows = words_of(caption), [words_of(reference) for reference in references]
    most: list[Ngrams] = [Counter() for _ in range(LONGEST)]
    for row in rows:
        most = [counts | more for counts, more in zip(most, ngrams_of(row))]
    said = ngrams_of(words)
    found = [sum((counts & limit).values()) for counts, limit in zip(said, most)]
    nearest = min((abs(len(row) - len(words)), len(row)) for row in rows)[1]
    return [*found, *(sum(counts.values()) for counts in said), len(words), nearest]


def bleu_4(totals: ArrayLike) -> np.ndarray:
    """BLEU-4 of sums of `bleu_counts`, float[..., 10]: float[...], 0 where no 4-gram was found."""
    totals = np.asarray(totals, float)
    found, tried = totals[..., :LONGEST], totals[..., LONGEST : 2 * LONGEST]
    length, nearest = totals[..., -2], totals[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(found / tried).mean(-1))
        brevity = np.where(length < nearest, np.exp(1 - nearest / length), 1.0)
        return np.nan_to_num(precision * brevity)
