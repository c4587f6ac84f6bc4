"""What `plan` found, for people."""

from typing import Any

from rich.table import Table

from vora.report.words import duration


def plan_table(found: dict[str, Any]) -> Table:
    """What `plan` found, as a table for the terminal."""
    counts, tokens = found["parameters"], found["tokens"]
    num, device = found["num_devices"], found["device"]
    table = Table(title=f"Stage {found['stage']} on {num} x {device}", show_header=False)

    def add(name: str, total: str, parts: dict[str, float], kind: str, unit: float = 1.0) -> None:
        table.add_row(name, total)
        for part, value in parts.items():
            mark = "  <- the bottleneck" if part == found["bottleneck"] else ""
            if value and part != "total":
                table.add_row(f"  {part.replace('_', ' ')}", kind.format(value / unit) + mark)

    def gigabytes(name: str, sizes: dict[str, float], fits: str = "") -> None:
        add(name, f"{sizes['total'] / 1e9:,.2f} GB{fits}", sizes, "{:,.2f} GB", 1e9)

    trained = (
        f"{counts['trained']:,} trained, {counts['frozen']:,} frozen, LoRA in {counts['blocks_with_lora']} blocks"
    )
    add("parameters", trained, counts["parts"], "{:,.0f}")
    table.add_row(
        "tokens per sample",
        f"{tokens['per_sample']:,.0f} ({tokens['samples_per_row']:.1f} samples per packed sequence)",
    )
    flops = found["flops_per_sample"]
    add("FLOPs per sample", f"{flops['total'] / 1e12:,.2f} T", flops, "{:,.2f} T", 1e12)
    fits = f": {'fits' if found['fits'] else 'DOES NOT FIT'} {found['device_memory_bytes'] / 1e9:,.2f} GB"
    gigabytes("memory of each device", found["memory_bytes"], fits)
    gigabytes("disk", found["disk_bytes"])
    batch = f"{found['rows_per_device']:,} sequences x {found['accumulated']:,} accumulated x {num:,} {device}"
    total = f"{found['rows_per_step']:,} sequences, some {found['samples_per_step']:,.0f} samples"
    table.add_row("batch of a step", f"{batch} = {total}")
    samples = f"{found['steps']:,} of {found['samples_per_step']:,.0f} samples: {found['samples']:,.0f} in all"
    add("steps", samples, found["seconds_per_step"], "{:,.3f} s a step")
    speed = f"{found['samples_per_second']:,.1f} at {found['utilization']:.0%} of the device's peak"
    table.add_row("samples per second", speed)
    time = duration(3600 * found["hours"])
    table.add_row("time", time if num == 1 else f"{time}, {found['device_hours']:,.0f} device hours")
    return table
