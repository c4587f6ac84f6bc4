"""WordNet 3.0's nouns and how near two of them are (Wu and Palmer 1994), without a download.

`wordnet_nouns.xz` holds the nouns, what each is a kind of, and irregular plurals, after WordNet's licence.
"""

import lzma
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path

# plural ending: singular ending, as WordNet's own morphology has them
ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("men", "man"),
    ("ies", "y"),
)  # fmt: skip


class Nouns:
    """Senses of nouns, and the tree (nearly) that they form.

    Args:
        text: what `pack_nouns` returns.
    """

    def __init__(self, text):
        _, kinds, words, irregular = text.split("\n\n")
        self.kinds_of = [  # of each sense, the senses that it is a kind of
            [number - int(step) for step in steps.split(",") if step != "-"]
            for number, steps in enumerate(kinds.split(" "))
        ]
        rows = (row.split(" ") for row in words.split("\n"))
        self.senses_of_word = {word: [int(sense) for sense in senses] for word, *senses in rows}
        rows = (row.split(" ") for row in irregular.strip().split("\n"))
        self.irregular = {plural: singulars for plural, *singulars in rows}

    def senses(self, noun):
        """Numbers of the senses of a noun, plurals and words with spaces included, the most common first."""
        noun = noun.lower().replace(" ", "_")
        regular = [noun[: -len(end)] + new for end, new in ENDINGS if noun.endswith(end)]
        forms = [noun, *self.irregular.get(noun, regular)]
        return list(dict.fromkeys(sense for form in forms for sense in self.senses_of_word.get(form, ())))

    @lru_cache(1 << 16)
    def above(self, sense):
        """{sense: fewest steps up to it}, itself included."""
        found = {sense: 0}
        for kind in self.kinds_of[sense]:
            for other, steps in self.above(kind).items():
                found[other] = min(found.get(other, steps + 1), steps + 1)
        return found

    @lru_cache(1 << 16)
    def depths(self, sense):
        """(fewest, most) steps to the root."""
        kinds = [self.depths(kind) for kind in self.kinds_of[sense]]
        if not kinds:
            return 0, 0
        return 1 + min(fewest for fewest, _ in kinds), 1 + max(most for _, most in kinds)

    def wu_palmer(self, first, second):
        """Similarity of two senses in (0, 1]: twice the depth of what both are a kind of, over the sum of theirs.

        As NLTK computes it, but for which of several equally deep ones is taken (1 of 4,000 pairs of DAQUAR's words).
        """
        above_first, above_second = self.above(first), self.above(second)
        common = above_first.keys() & above_second.keys()
        if not common:
            return 0.0
        if first in common:
            shared = first
        else:
            deepest = max(self.depths(sense)[0] for sense in common)
            shared = min(sense for sense in common if self.depths(sense)[0] == deepest)
        depth = self.depths(shared)[1] + 1
        return 2 * depth / (self._steps(above_first, shared) + self._steps(above_second, shared) + 2 * depth)

    def _steps(self, above, shared):
        """Fewest steps between a sense, by what is above it, and one of these; the way may lead over another."""
        above_shared = self.above(shared)
        return min(steps + above_shared[sense] for sense, steps in above.items() if sense in above_shared)

    @lru_cache(1 << 16)
    def similarity(self, first, second):
        """Wu-Palmer similarity of two nouns in [0, 1]: that of their nearest senses; 0 if one is unknown."""
        pairs = [(a, b) for a in self.senses(first) for b in self.senses(second)]
        return max((self.wu_palmer(*pair) for pair in pairs), default=0.0)


@cache
def nouns():
    """The `Nouns` of WordNet 3.0."""
    return Nouns(lzma.decompress((files("vora.eval") / "wordnet_nouns.xz").read_bytes()).decode())


def pack_nouns(folder):
    """The database files of WordNet (`data.noun`, `index.noun`, `noun.exc`, `LICENSE`) as the text of `Nouns`.

    Of the synsets in order: how many places before each those stand that it is a kind of (or an instance of).
    """
    folder = Path(folder)
    licence = "\n".join(line.strip() for line in (folder / "LICENSE").read_text().split("\n") if line.strip())
    synsets = [line.split(" | ")[0].split() for line in _lines(folder / "data.noun")]
    number_of = {synset[0]: number for number, synset in enumerate(synsets)}
    kinds = []
    for number, synset in enumerate(synsets):
        first = 5 + 2 * int(synset[3], 16)  # after the words; a pointer is kind, synset, part of speech, place
        pointers = [synset[place : place + 2] for place in range(first, first + 4 * int(synset[first - 1]), 4)]
        steps = [number - number_of[other] for kind, other in pointers if kind in ("@", "@i")]
        kinds.append(",".join(map(str, steps)) or "-")
    words = []
    for line in _lines(folder / "index.noun"):
        word, _, count, *rest = line.split()
        words.append(" ".join([word, *(str(number_of[synset]) for synset in rest[-int(count) :])]))
    irregular = [line.strip() for line in _lines(folder / "noun.exc")]
    return "\n\n".join([licence, " ".join(kinds), "\n".join(words), "\n".join(irregular)]) + "\n"


def _lines(file):
    return [line for line in file.read_text().splitlines() if not line.startswith("  ")]
