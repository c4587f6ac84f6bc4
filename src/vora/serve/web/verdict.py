"""Whether a model looked, in one sentence, from the answers to one question."""

from collections.abc import Mapping

from vora.serve.web.conditions import BLANK, RIGHT, SHUFFLED


def verdict(answers: Mapping[str, str], temperature: float = 0.0) -> str:
    """What whole answers by condition say; empty where there is nothing to compare."""
    if RIGHT not in answers or len(answers) < 2:
        return ""
    if temperature:
        return (
            f"These answers are drawn at random (temperature {temperature:g}), so that they differ shows nothing: "
            "with temperature 0 they can be compared."
        )
    same = {condition: _plain(text) == _plain(answers[RIGHT]) for condition, text in answers.items()}
    if same.get(BLANK) and not same.get(SHUFFLED, True):
        return (
            "The same answer with a blank image, another with shuffled patches: what is in the image changes the "
            "answer, but this one needs no image."
        )
    if same.get(BLANK):
        return "The same answer with a blank image: it does not look at the image for this question."
    if same.get(SHUFFLED) and BLANK in same:
        return (
            "Another answer with a blank image, the same with shuffled patches: it looks at the image for this "
            "question, but not at where things are."
        )
    if same.get(SHUFFLED):
        return "The same answer with shuffled patches: where things are does not matter for this question."
    changed = " and ".join({BLANK: "a blank image", SHUFFLED: "shuffled patches"}[one] for one in same if one != RIGHT)
    return f"Another answer with {changed}: it looks at the image for this question, rightly or not."


def _plain(text: str) -> str:
    """An answer without what does not count: case, white space, the full stop at its end."""
    return " ".join(text.lower().split()).rstrip(".")
