"""Rows of a benchmark: ours beside a named baseline, with the machine and the commit, as text and as JSON."""

import argparse
import ctypes
import gc
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

from vora.cpu_threads import configure_cpu_threads

LINE = "{:>10} {:>10} {:>8} {:12} {}"


def parser_of(description):
    """An argument parser with what all benchmarks take; `description` is a module's docstring."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--threads", type=int, help="of torch; its own choice without it")
    return parser


def arguments(parser):
    """Parse the command line and set threads, after a new start if torch's threads do not wait as vora's."""
    args = parser.parse_args()
    is_script = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    if is_script and "GOMP_SPINCOUNT" not in os.environ:  # which torch read when it was imported
        configure_cpu_threads()
        os.execv(sys.executable, [sys.executable, *sys.argv])
    torch.set_num_threads(args.threads or torch.get_num_threads())
    return args


def machine():
    """One line: what computes, on how many threads, with which torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    name = _noted("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return f"{name} ({torch.backends.cpu.get_cpu_capability()}), {threads}, torch {torch.__version__}"


def commit():
    """The commit that was measured, with a + where the working tree differs from it; "unknown" outside a clone."""
    words = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def row(name, ours, baseline, unit, **more):
    """One comparison, with the ratio ours / baseline where there are both."""
    ratio = ours / baseline if ours is not None and baseline else None
    return {"name": name, "ours": ours, "baseline": baseline, "ratio": ratio, "unit": unit} | more


def report(rows, json_file=None):
    """Print rows as they come, and write those so far to a file, with `machine` and `commit` in each: a benchmark that
    is stopped, or fails, leaves the rows that it had. Returns the list of all."""
    where = {"machine": machine(), "commit": commit()}
    print(f"{where['machine']}, commit {where['commit']}")
    print(LINE.format("ours", "baseline", "ratio", "unit", "what"))
    found = []
    for one in rows:
        found.append(one | where)
        if json_file:
            json_file.write_text(json.dumps(found, indent=1))
        print_row(one)
    return found


def print_row(one):
    figures = ("-" if one[figure] is None else f"{one[figure]:.4g}" for figure in ("ours", "baseline", "ratio"))
    print(LINE.format(*figures, one["unit"], one["name"]), flush=True)


def seconds(work):
    """Time of one call, to its end on the device."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else torch.cpu.synchronize
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


def spread(times):
    """Half the range of a list of times as a share of its median: how noisy the machine was."""
    return (max(times) - min(times)) / 2 / median(times)


def compared(name, times, unit, figure=float, ours="ours", baseline="original", **more):
    """The `row` of two contestants of `alternate`, with how noisy each was; `figure` turns seconds into the unit. The
    ratio is the median of the rounds' own ratios, so that slow changes of the machine cancel out."""
    noise = {"ours": spread(times[ours]), "baseline": spread(times[baseline])}
    ratio = median(figure(one) / figure(other) for one, other in zip(times[ours], times[baseline]))
    medians = figure(median(times[ours])), figure(median(times[baseline]))
    return row(name, *medians, unit, noise=noise, **more) | {"ratio": ratio}


def restart_peak():
    """Forget earlier peaks, where the system can; returns the bytes held now, without what is free already."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what making a model left behind would hide what comes next
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return peak_bytes()
    return _status_bytes("VmRSS") or peak_bytes()


def peak_bytes():
    """Most memory held since `restart_peak`: of the GPU where there is one, else of this process (resident)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _status_bytes("VmHWM") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _status_bytes(name):
    return 1024 * int(_noted("/proc/self/status", name).removesuffix("kB") or 0)


def _noted(file, name):
    """What Linux notes under a name, else empty."""
    lines = Path(file).read_text().splitlines() if Path(file).exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def main():
    """Print the rows of JSON files once more, in one table."""
    for file in map(Path, sys.argv[1:]):
        print(file.stem)
        for one in json.loads(file.read_text()):
            print_row(one)


if __name__ == "__main__":
    main()
