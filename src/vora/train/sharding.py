"""FSDP2: weights, gradients and the optimizer's state spread over processes, block by block, through accelerate.

A checkpoint does not depend on how many processes there were: weights are gathered tensor by tensor and lie there as
those of any run, the optimizer's state in parts (`optimizer/`) that any number of processes reads.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainingArguments

from vora.checkpoint.manifest import OPTIMIZER_FOLDER
from vora.distill.objective import Objective

FIELDS_FILE = "fields.pt"  # what is no tensor of a parameter's shape: groups, numbers of steps
KNOWN = ("version", "reshard_after_forward", "transformer_layer_cls_to_wrap", "auto_wrap_policy")
BY_BLOCK = "TRANSFORMER_BASED_WRAP"


def check_sharding(arguments: TrainingArguments) -> None:
    """Raise where `training.fsdp` asks for what would not be done, or `fsdp_config` for anything without it."""
    config = dict(arguments.fsdp_config or {})
    if not arguments.fsdp:
        if config.keys() - {"version"}:
            raise ValueError("training.fsdp_config changes nothing without training.fsdp: set training.fsdp=true.")
        return
    if arguments.world_size == 1:
        raise ValueError(
            "training.fsdp spreads weights over processes, and there is one: start several with `torchrun "
            "--nproc_per_node N -m vora.cli train ...`, or set training.fsdp=false."
        )
    if int(config.get("version", 2)) != 2 or config.get("auto_wrap_policy", BY_BLOCK) != BY_BLOCK:
        raise ValueError("training.fsdp is FSDP2, by decoder block: leave fsdp_config's version and policy out.")
    if wrong := [key for key, value in config.items() if key not in KNOWN and value not in (None, False, 0, "false")]:
        raise ValueError(
            f"training.fsdp_config.{wrong[0]} is not supported: blocks are recomputed by "
            "training.gradient_checkpointing, checkpoints fit any number of processes, and nothing is offloaded. "
            f"Known are {', '.join(KNOWN[1:3])}."
        )


def shard(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Have an accelerator spread what it prepares. By itself accelerate does so on GPUs alone, and would train on
    processors with DDP. Sums of gradients are in float32, and a batch's counts and weights stay as they are."""
    state: Any = accelerator.state
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is None:
        plugin = FullyShardedDataParallelPlugin(**arguments.fsdp_plugin_args)
        state.distributed_type, state.fsdp_plugin = DistributedType.FSDP, plugin
        if accelerator.mixed_precision != "no":
            plugin.set_mixed_precision(accelerator.mixed_precision)
    if (policy := plugin.mixed_precision_policy) is not None:
        exact = {"reduce_dtype": torch.float32, "output_dtype": None}  # losses are summed up as they come
        plugin.mixed_precision_policy = replace(policy, **exact, cast_forward_inputs=False)


def saved_tensors(objective: Objective) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds of an objective: in stage 1 what trains, else the whole student; and the moments."""
    is_peft, persistent = isinstance(objective.student, PeftModel), objective.student.state_dict().keys()
    for name, parameter in objective.student.named_parameters(remove_duplicate=False):
        if parameter.requires_grad or not is_peft:
            yield f"student.{name}", parameter
    for name, buffer in objective.student.named_buffers():
        if name in persistent and not is_peft:
            yield f"student.{name}", buffer
    if objective.distillation is not None:
        for name, tensor in chain(objective.distillation.named_parameters(), objective.distillation.named_buffers()):
            yield f"distillation.{name}", tensor


def gathered(tensors: Iterator[tuple[str, Tensor]], keeps: bool) -> dict[str, Tensor]:
    """Whole tensors on the host, of all processes together, one at a time; {} in those that do not keep them. Names of
    one tensor, such as tied embeddings, stay names of one."""
    whole: dict[int, Tensor] = {}
    names = {}
    for name, tensor in tensors:
        if id(tensor) not in whole:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            whole[id(tensor)] = full.detach().cpu() if keeps else full.new_empty(0)
        names[name] = id(tensor)
    return {name: whole[number] for name, number in names.items()} if keeps else {}


def like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, spread as a parameter is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)


def tie_unused(loss: Tensor, modules: list[nn.Module]) -> Tensor:
    """A loss to which modules that it does not depend on add nothing: other processes may have used them, and all have
    to sum the same gradients."""
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                loss = loss + 0.0 * parameter.sum()
    return loss


def save_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Write an optimizer's state, each process its own part of it."""
    folder, (tensors, fields) = checkpoint / OPTIMIZER_FOLDER, _state(model, optimizer)
    dcp.save(tensors, checkpoint_id=folder)
    if dist.get_rank() == 0:
        torch.save({"fields": fields, "groups": _groups(optimizer), "names": sorted(tensors)}, folder / FIELDS_FILE)


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Read back what `save_optimizer` wrote, or what an optimizer that was not spread left in optimizer.pt; by any
    number of processes, sharded or not."""
    names = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    order = {id(parameter): number for number, parameter in enumerate(_ordered(optimizer))}
    folder = checkpoint / OPTIMIZER_FOLDER
    if not folder.exists():
        saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        parameters = _ordered(optimizer)
        for number, state in saved["state"].items():
            shape = parameters[number].shape
            state |= {k: like(v, parameters[number]) for k, v in state.items() if _is_of(v, shape)}
        optimizer.load_state_dict(saved)
        return
    saved = torch.load(folder / FIELDS_FILE, map_location="cpu", weights_only=True)
    tensors: dict[str, Any] = {}
    for name in saved["names"]:
        tensors[name] = torch.zeros_like(names[name.rpartition("/")[0]].detach())
    dcp.load(tensors, checkpoint_id=folder)
    found: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *saved["fields"].items()]:
        parameter, _, key = name.rpartition("/")
        found.setdefault(order[id(names[parameter])], {})[key] = value
    optimizer.load_state_dict({"state": found, "param_groups": saved["groups"]})


def _ordered(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return optimizer.state_dict()["param_groups"]


def _is_of(value: Any, shape: torch.Size) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape == shape


def _state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """({parameter/key: tensor of its shape}, {parameter/key: anything else}) of an optimizer."""
    tensors: dict[str, Tensor] = {}
    fields: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            place = tensors if _is_of(value, parameter.shape) else fields
            place[f"{name}/{key}"] = value
    return tensors, fields
