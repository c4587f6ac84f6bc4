"""The configuration of an adapter as it comes from a file: what ours say, and nothing else that PEFT would act on."""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vora.build.lora import ALL_OF_PATCH_EMBEDDING

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NOTES = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}

Name = Annotated[str, Field(pattern=r"^\w{1,100}$")]  # of a module; a pattern of many could search for ever
Block = Annotated[int, Field(ge=0)]


class AdapterConfig(BaseModel):
    """Plain LoRA on linear layers of some blocks, and what trains beside it."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    peft_type: Literal["LORA"]
    r: int = Field(ge=1)
    lora_alpha: int | float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    target_modules: list[Name] = Field(min_length=1)
    layers_to_transform: list[Block] = Field(min_length=1)
    layers_pattern: Name
    modules_to_save: list[Literal["patch_embedding", "projector"]] = Field(min_length=1)
    exclude_modules: str | None = Field(None, pattern=f"^{re.escape(ALL_OF_PATCH_EMBEDDING)}$")


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's configuration of the adapter in a folder; ValueError where the file says more than an `AdapterConfig`.

    PEFT itself would let it name modules to import, other files, ways to begin that cost hours, and patterns.
    """
    file = folder / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        config = AdapterConfig.model_validate(values)
        _check_others(values)
        _check_rank(folder / WEIGHTS_FILE, config.r)
    except ValidationError as error:
        first = error.errors()[0]
        cause = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        cause = str(error)
    else:
        return LoraConfig(**config.model_dump(exclude={"peft_type"}))
    raise ValueError(f"{file} describes no vision LoRA of vora ({' '.join(cause.split())[:300]}).")


def _check_others(values: dict[str, Any]) -> None:
    usual = LoraConfig().to_dict()
    known = AdapterConfig.model_fields.keys() | NOTES
    others = [name for name, value in values.items() if name not in known and value and value != usual.get(name)]
    if others:
        raise ValueError(f"it sets {', '.join(others)}, which our adapters leave alone")


def _check_rank(weights: Path, rank: int) -> None:
    """Memory is taken by the rank that the configuration says, so that it must be that of the tensors there."""
    if not weights.exists():
        return  # said where they are read
    with safe_open(weights, "pt") as file:
        ranks = {file.get_slice(name).get_shape()[0] for name in file.keys() if name.endswith("lora_A.weight")}
    if ranks != {rank}:
        raise ValueError(f"its rank is {rank}, but its tensors have {sorted(ranks)}")
