"""Data with few different answers is warned of, and other data is not."""

from vora.data.few_answers import few_answers
from vora.data.schema import Sample


def samples(*answers):
    """A sample for each answer, to the same question."""
    turns = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}] for answer in answers]
    return [Sample("", [], [one]) for one in turns]


def test_a_task_with_few_answers_is_warned_of_and_captions_or_text_beside_it_are_enough():
    task, captions = samples(*["yes", "no", "teal"] * 50), samples(*(f"a dog, number {n}" for n in range(50)))
    text = [Sample("", [], [[{"role": "text", "content": f"text {n}"}]]) for n in range(50)]
    warning = few_answers([task])
    assert warning.startswith('of 139 answers looked at only 3 are different ("yes", "no", "teal", ...)')
    assert few_answers([task, captions]) is few_answers([task, text]) is few_answers([captions]) is None
    assert few_answers([]) is few_answers([[]]) is few_answers([samples(*["yes"] * 20)]) is None  # too few to tell


def test_rows_are_from_all_over_a_source_and_bad_ones_are_left_out():
    class Rows(list):
        def __getitem__(self, index):
            if index in (0, 5000):
                raise ValueError("it is bad")
            return list.__getitem__(self, index)

    by_class = samples(*(f"class {number // 1000}" for number in range(10_000)))
    assert "of 190 answers looked at only 3 are" in few_answers([Rows(by_class)])
