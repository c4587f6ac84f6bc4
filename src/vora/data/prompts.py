"""What is asked where a row of a file holds an answer but no question; training and evaluation ask the same."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Prompts:
    """For each kind of row, the prompts of which one is drawn; evaluation takes the first. ValueError for none."""

    caption: tuple[str, ...] = ("Describe the image.",)
    label: tuple[str, ...] = ("What is this?",)  # of the name of a class
    statement: tuple[str, ...] = ("True or false? {}",)  # of a sentence, which stands at {}

    def __post_init__(self) -> None:
        if empty := [field.name for field in fields(self) if not getattr(self, field.name)]:
            raise ValueError(f"There are 0 {empty[0]} prompts: give at least one.")
        if wrong := [prompt for prompt in self.statement if prompt.count("{}") != 1]:
            raise ValueError(f"The statement prompt {wrong[0]!r} needs one {{}}, where the statement goes.")


DEFAULT_PROMPTS = Prompts()
TRUE_FALSE = ("true", "false")
