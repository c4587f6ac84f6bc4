"""What is asked where a row of a file holds an answer but no question; training and evaluation ask the same."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompts:
    """For each kind of row, the prompts of which one is drawn; evaluation takes the first.

    Args:
        caption: asked where the row has captions.
        label: asked where it has the name of a class.
        statement: asked where it has a sentence that is true or false, which stands at `{}`.

    Raises:
        ValueError: a list is empty, or a prompt for statements has no place for one.
    """

    caption: tuple[str, ...] = ("Describe the image.",)
    label: tuple[str, ...] = ("What is this?",)
    statement: tuple[str, ...] = ("True or false? {}",)

    def __post_init__(self) -> None:
        for name in ("caption", "label", "statement"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not getattr(self, name):
                raise ValueError(f"There are 0 {name} prompts: give at least one.")
        if wrong := [prompt for prompt in self.statement if prompt.count("{}") != 1]:
            raise ValueError(f"The statement prompt {wrong[0]!r} needs one {{}}, where the statement goes.")


DEFAULT_PROMPTS = Prompts()
TRUE_FALSE = ("true", "false")
