"""A plan as a table for the terminal."""

from rich.table import Table

from vora.train.plan.plan import Plan


def tables(found: Plan) -> Table:
    """The plan as a table for the terminal."""
    counts, tokens, times = found["parameters"], found["tokens"], found["seconds_per_step"]
    what = Table(title=f"Stage {found['stage']} on {found['num_devices']} x {found['device']}", show_header=False)
    what.add_row("parameters", f"{counts['trained']:,} trained, {counts['frozen']:,} frozen")
    for part, count in counts["parts"].items():
        blocks = f" in {counts['blocks_with_lora']} blocks" if part == "vision LoRA" else ""
        what.add_row(f"  {part}", f"{count:,}{blocks}")
    what.add_row("tokens per sample", f"{tokens['per_sample']:,.0f} ({tokens['samples_per_row']:.1f} samples per row)")
    what.add_row("FLOPs per sample", f"{found['flops_per_sample']['total'] / 1e12:,.2f} T")
    for part, value in found["flops_per_sample"].items():
        if part != "total" and value:
            what.add_row(f"  {part.replace('_', ' ')}", f"{value / 1e12:,.2f} T")
    memory = found["memory_bytes"]
    fits = "fits" if found["fits"] else "DOES NOT FIT"
    what.add_row(
        "memory of each device", f"{gigabytes(memory['total'])}: {fits} {gigabytes(found['device_memory_bytes'])}"
    )
    for part, size in memory.items():
        if part != "total" and size:
            what.add_row(f"  {part}", gigabytes(size))
    what.add_row("disk", gigabytes(found["disk_bytes"]["total"]))
    for part, size in found["disk_bytes"].items():
        if part != "total" and size:
            what.add_row(f"  {part}", gigabytes(size))
    what.add_row("steps", f"{found['steps']:,} of {found['samples_per_step']:,.0f} samples: {found['samples']:,.0f}")
    for part, seconds in times.items():
        mark = "  <- the bottleneck" if part == found["bottleneck"] else ""
        what.add_row(f"  {part}", f"{seconds:,.3f} s a step{mark}")
    speed = f"{found['samples_per_second']:,.1f} at {found['utilization']:.0%} of the device's peak"
    what.add_row("samples per second", speed)
    what.add_row("time", f"{found['hours']:,.1f} hours, {found['device_hours']:,.0f} device hours")
    return what


def gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"
