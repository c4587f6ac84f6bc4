"""Rows of a benchmark: ours beside a named baseline, with the machine and the commit, as text and as JSON."""

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from pathlib import Path
from statistics import median

import torch

HEADINGS = ("name", "ours", "baseline", "ratio", "unit")


def parser_of(description):
    """An argument parser with `--json`, which all benchmarks take; `description` is a module's docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser


def machine():
    """One line: what computes, on how many threads, with which torch."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{device}, torch {torch.__version__}"


def _processor():
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line for line in lines if line.startswith("model name")]
    name = names[0].split(":")[1].strip() if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def commit():
    """The commit that was measured, with a + where the working tree differs from it; "unknown" outside a clone."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short", "HEAD")
    return "unknown" if not head else head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def row(name, ours, baseline, unit, ratio=None, **more):
    """One comparison. `ratio` is ours / baseline unless it is given."""
    if ratio is None and ours is not None and baseline:
        ratio = ours / baseline
    return {"name": name, "ours": ours, "baseline": baseline, "ratio": ratio, "unit": unit} | more


def report(rows, json_file=None):
    """Print rows as a table, and write them to a file with `machine` and `commit` in each."""
    where = {"machine": machine(), "commit": commit()}
    rows = [one | where for one in rows]
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1))
    width = max(len(one["name"]) for one in rows)
    print(f"{where['machine']}, commit {where['commit']}")
    print(f"{HEADINGS[0]:{width}} " + " ".join(f"{heading:>10}" for heading in HEADINGS[1:4]) + f" {HEADINGS[4]}")
    for one in rows:
        figures = " ".join(f"{_short(one[heading]):>10}" for heading in HEADINGS[1:4])
        print(f"{one['name']:{width}} {figures} {one['unit']}")


def _short(value):
    return "-" if value is None else f"{value:.4g}"


def synchronize():
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(work):
    """Wall-clock time of one call, to its end on the device."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def alternate(contestants, rounds, warmups=1):
    """Time several functions in turn, so that a busy moment of the machine meets all of them.

    Args:
        contestants: {name: function without arguments}.

    Returns:
        {name: list of seconds, one per round}.
    """
    for _ in range(warmups):
        for work in contestants.values():
            work()
    times = {name: [] for name in contestants}
    for turn in range(rounds):
        names = list(contestants)
        for name in names if turn % 2 == 0 else names[::-1]:
            times[name].append(seconds(contestants[name]))
    return times


def medians(times):
    """{name: median seconds} of `alternate`."""
    return {name: median(values) for name, values in times.items()}


def spread(times):
    """Half the range of a list of times as a share of its median: how noisy the machine was."""
    return (max(times) - min(times)) / 2 / median(times)


def restart_peak():
    """Forget earlier peaks, where the system can; returns the bytes held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()
    return _status("VmRSS") or peak_bytes()


def peak_bytes():
    """Most memory held since `restart_peak`: of the GPU where there is one, else of this process (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status(name):
    """Bytes that Linux notes of this process under a name, else None."""
    notes = Path("/proc/self/status")
    lines = notes.read_text().splitlines() if notes.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
