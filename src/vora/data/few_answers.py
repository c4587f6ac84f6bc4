"""Whether data teaches a few answers alone: a model that has learned from it says nothing else."""

from collections import Counter
from collections.abc import Iterator, Sequence

from vora.data.schema import Sample
from vora.data.source import Source
from vora.data.turns import text_in

NUM_NEAR = 64  # neighbouring rows that are looked at, at the start, in the middle and at the end of a source
FEWEST, REPEATS = 100, 10  # answers that say something, and how often each is there where they are few


def few_answers(sources: Sequence[Source | Sequence[Sample]]) -> str | None:
    """What to be warned of where nearly all answers are the same few, by a look at some rows of each source."""
    answers = Counter(answer for source in sources for answer in _answers_in(source))
    if answers.total() < FEWEST or len(answers) * REPEATS > answers.total():
        return None
    said = ", ".join(f'"{answer[:20]}"' for answer, _ in answers.most_common(3))
    return (
        f"of {answers.total():,} answers looked at only {len(answers)} are different ({said}, ...). A model that "
        "learns from these alone answers every question with one of them, and forgets the LLM's other words: mix in "
        "captions, conversations or text."
    )


def _answers_in(source: Source | Sequence[Sample]) -> Iterator[str]:
    rows = range(len(source))
    for index in sorted({*rows[:NUM_NEAR], *rows[len(rows) // 2 :][:NUM_NEAR], *rows[-NUM_NEAR:]}):
        try:
            conversations = source[index].conversations
        except ValueError:  # counted and named when it is trained on
            continue
        yield from (text_in(turn) for said in conversations for turn in said if turn["role"] in ("assistant", "text"))
