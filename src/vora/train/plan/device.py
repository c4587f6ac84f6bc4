"""What a run is planned for: GPUs by their makers' data sheets, or the device at hand."""

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

FAST = 4e11  # FLOP/s of a thread in bf16: with AMX 1e12, with AVX512 alone 2e11


@dataclass
class Device:
    """What samples are trained on: peak FLOP/s of dense bf16 matrix products, memory, and the bytes per second of its
    link to the others in the same machine."""

    name: str
    flops: float
    memory_bytes: float
    link: float = 25e9

    @property
    def utilization(self) -> float:
        """The share of the peak that training is assumed to reach: less of a processor whose products are fast, since
        there all else takes most of the time (dev/LOG.md)."""
        is_fast = self.name == "cpu" and self.flops > FAST * torch.get_num_threads()
        return 0.2 if is_fast else 0.4


# Peaks without sparsity and memory, by the makers' data sheets; links by NVLink's or PCIe's generation.
GPUS = {
    "b200": Device("B200", 2250e12, 180e9, 900e9),
    "h200": Device("H200", 989e12, 141e9, 450e9),
    "h100": Device("H100 SXM", 989e12, 80e9, 450e9),
    "a100": Device("A100 80 GB", 312e12, 80e9, 300e9),
    "a100-40": Device("A100 40 GB", 312e12, 40e9, 300e9),
    "l40s": Device("L40S", 362e12, 48e9),
    "l4": Device("L4", 121e12, 24e9),
    "a10g": Device("A10G", 70e12, 24e9),
    "rtx4090": Device("RTX 4090", 165e12, 24e9),
    "rtx3090": Device("RTX 3090", 71e12, 24e9),
}


def device_at_hand(bf16: bool = False) -> Device:
    """The GPU of this machine, or its processor where there is none."""
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(0)
        known = known_gpu(found.name)
        if known is not None:
            return replace(known, name=found.name, memory_bytes=found.total_memory)
        return Device(found.name, matmul_flops("cuda", torch.bfloat16), found.total_memory)
    return processor_at_hand(bf16)


def processor_at_hand(bf16: bool = False) -> Device:
    """The processor of this machine, with a peak measured in what training computes in."""
    pages = Path("/proc/meminfo")
    total = 1024 * int(pages.read_text().split()[1]) if pages.exists() else 16e9
    return Device("cpu", matmul_flops("cpu", torch.bfloat16 if bf16 else torch.float32), total)


def known_gpu(name: str) -> Device | None:
    """Of `GPUS` the one that CUDA calls so, or None; an RTX is known by its number."""
    for gpu in GPUS.values():
        mark = gpu.name if gpu.name.startswith("RTX") else gpu.name.split()[0]
        if re.search(rf"\b{mark}\b", name):
            return gpu
    return None


def matmul_flops(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of this device's matrix products, the best of a few."""
    side, products = (8192, 8) if device == "cuda" else (1024, 1)  # a GPU is asked for long enough to be in step
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(products):
            product = left @ right
        product[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * products * side**3 / min(seconds)
