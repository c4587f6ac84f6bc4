"""Fields of transformers' TrainingArguments in a recipe: each value is checked before anything is loaded."""

import difflib
import inspect
from collections.abc import Iterable
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, get_args, get_type_hints

import torch
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import is_torch_bf16_gpu_available, is_torch_tf32_available

AT_LEAST_ONE = ("per_device_train_batch_size", "gradient_accumulation_steps", "save_total_limit")
ABOVE_ZERO = ("logging_steps", "save_steps", "adam_epsilon")
NOT_NEGATIVE = (
    "learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "dataloader_num_workers", "seed", "adam_beta1",
    "adam_beta2",
)  # fmt: skip
BELOW_ONE = ("adam_beta1", "adam_beta2")
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list[str]: "a list of texts"}
EXTRAS = ("tensorboard", "wandb", "trackio")  # of this package, of the same name as the integration


@cache
def known_fields() -> dict[str, Any]:
    """{name: type} of what a recipe's `training` may set."""
    hints = get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in fields(TrainingArguments) if field.name != "output_dir"}


def wrong_value(key: str, value: Any) -> str | None:
    """What is wrong with a value of a known field, in words, or None."""
    kind = known_fields().get(key)
    if kind is None or key in ("fsdp", "debug"):  # true, or lists: TrainingArguments says itself what it takes
        return None
    if key.endswith("_kwargs") and value is not None and not isinstance(value, dict):
        return f"training.{key} is {value!r}: give keys with values, such as {{num_cycles: 2}}"
    kinds = [one for one in (get_args(kind) or (kind,)) if one is not type(None)]
    for choice in kinds:
        if inspect.isclass(choice) and issubclass(choice, Enum):
            names = [one.value for one in choice]
            return None if value in names else f"training.{key} is {value!r}{nearest(value, names, 3)}"
    try:
        TypeAdapter(kind).validate_python(value, strict=True)
    except PydanticUserError:  # a type of a library's own
        return None
    except ValidationError:
        wanted = " or ".join(dict.fromkeys(WORDS.get(one, "keys with values") for one in kinds))
        return f"training.{key} is {value!r}: give {wanted}"
    return _out_of_range(key, value)


def nearest(key: object, known: Iterable[str], most: int = 1) -> str:
    """The known names that a misspelt one is like, or some of the known ones, for a message."""
    given = list(known)
    begin = [name for name in given if most > 1 and name.startswith(str(key))]
    if close := begin or difflib.get_close_matches(str(key), given, n=most, cutoff=0.5):
        return f" (did you mean {' or '.join(close[:most])}?)"
    names = sorted(given)
    return f" (known: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''})"


def _out_of_range(key: str, value: Any) -> str | None:
    if not isinstance(value, int | float):
        return None
    for names, is_wrong, wanted in (
        (AT_LEAST_ONE, value < 1, "at least 1"),
        (ABOVE_ZERO, not value > 0, "more than 0"),
        (NOT_NEGATIVE, not value >= 0, "0 or more"),
        (BELOW_ONE, not value < 1, "less than 1"),
    ):
        if key in names and is_wrong:
            return f"training.{key} is {value}: give {wanted}"
    return None


def check_precision(training: dict[str, Any]) -> None:
    """Raise where this machine does not compute in what `training` asks for."""
    on_cpu, has_gpu = bool(training.get("use_cpu")), torch.cuda.is_available()
    where = "the processor is to compute (training.use_cpu)" if on_cpu else "there is no GPU here"
    if training.get("bf16") and training.get("fp16"):
        raise ValueError("training.bf16 and training.fp16 exclude each other: keep bf16")
    if training.get("bf16") and not on_cpu and not is_torch_bf16_gpu_available():
        why = "the GPU here does not compute in it" if has_gpu else where
        raise ValueError(
            f"training.bf16 is true, but {why}: set training.use_cpu=true to compute in it on the processor, or "
            "training.bf16=false"
        )
    if training.get("fp16") and (on_cpu or not has_gpu):
        raise ValueError(f"training.fp16 is true, but {where}: set training.fp16=false")
    if training.get("tf32") and (on_cpu or not is_torch_tf32_available()):
        raise ValueError("training.tf32 is true, but no GPU here multiplies in it: leave it out")


def check_libraries(arguments: TrainingArguments) -> None:
    """Raise where a value needs a library that is not installed, or an optimizer or a schedule does not take what it
    is given: the Trainer would say so once models are loaded."""
    for name in arguments.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"training.report_to {name} is unknown{nearest(name, INTEGRATION_TO_CALLBACK)}.")
        if name not in get_available_reporting_integrations():
            cure = f"'vora-vlm[{name}]'" if name in EXTRAS else name
            raise ValueError(
                f"training.report_to is {name}, which is not installed: pip install {cure}, or set it to none."
            )
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    except (ImportError, ValueError, TypeError) as error:
        raise ValueError(f"training.optim {arguments.optim}: {error}") from None
    options = dict(arguments.lr_scheduler_kwargs or {})
    try:
        get_scheduler(arguments.lr_scheduler_type, optimizer, 1, 100, scheduler_specific_kwargs=options)
    except (ValueError, TypeError) as error:
        name = getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)
        raise ValueError(f"training.lr_scheduler_type {name}, with lr_scheduler_kwargs {options}: {error}") from None
