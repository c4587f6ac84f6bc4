"""A plan as a table for the terminal."""

from typing import Any

from rich.table import Table


def tables(found: dict[str, Any]) -> Table:
    """What `vora.train.plan.plan.plan` found, as a table."""
    counts, tokens, memory, disk = (found[name] for name in ("parameters", "tokens", "memory_bytes", "disk_bytes"))
    table = Table(title=f"Stage {found['stage']} on {found['num_devices']} x {found['device']}", show_header=False)

    def add(name: str, value: str, parts: dict[str, str]) -> None:
        table.add_row(name, value)
        for part, value in parts.items():
            table.add_row(f"  {part.replace('_', ' ')}", value)

    parts = {part: f"{count:,}" for part, count in counts["parts"].items()}
    if "vision LoRA" in parts:
        parts["vision LoRA"] += f" in {counts['blocks_with_lora']} blocks"
    add("parameters", f"{counts['trained']:,} trained, {counts['frozen']:,} frozen", parts)
    add("tokens per sample", f"{tokens['per_sample']:,.0f} ({tokens['samples_per_row']:.1f} samples per row)", {})
    flops = {part: f"{value / 1e12:,.2f} T" for part, value in found["flops_per_sample"].items() if value}
    add("FLOPs per sample", flops.pop("total"), flops)
    fits = f"{'fits' if found['fits'] else 'DOES NOT FIT'} {gigabytes(found['device_memory_bytes'])}"
    add("memory of each device", f"{gigabytes(memory['total'])}: {fits}", sizes_of_parts(memory))
    add("disk", gigabytes(disk["total"]), sizes_of_parts(disk))
    times = {part: f"{seconds:,.3f} s a step" for part, seconds in found["seconds_per_step"].items()}
    if found["bottleneck"] in times:
        times[found["bottleneck"]] += "  <- the bottleneck"
    samples = f"{found['steps']:,} of {found['samples_per_step']:,.0f} samples: {found['samples']:,.0f}"
    add("steps", samples, times)
    speed = f"{found['samples_per_second']:,.1f} at {found['utilization']:.0%} of the device's peak"
    add("samples per second", speed, {})
    add("time", f"{found['hours']:,.1f} hours, {found['device_hours']:,.0f} device hours", {})
    return table


def sizes_of_parts(sizes: dict[str, float]) -> dict[str, str]:
    return {part: gigabytes(size) for part, size in sizes.items() if size and part != "total"}


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
