"""A contestant in a process of its own, so that the peak of memory is its alone.

The process is forked from one that has imported everything and done nothing else: it starts within milliseconds, and
Linux counts its peak (VmHWM) from there. Pages of libraries that it never touches are not counted, some 100 MB.
"""

import multiprocessing
import os
from pathlib import Path
from statistics import median

from rows import clock, peak_bytes, restart_peak, seconds, set_clock

IMPORTED = ("contestants", "prefill_decode")  # by the process that all others are forked from
PATIENCE = 10.0  # seconds; work that takes longer is not done again for the sake of a warm start
MOST_TIMED, SECONDS_OF_TIMES = 3, 5.0  # calls, as many as these seconds allow, but at least one


def in_own_process(work, *args):
    """What a function returns in a new process, with this one's threads and clock.

    Args:
        work: a function of a module.
        args: what pickle takes.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    prepare_environment()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, clock(), work, args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        cause = "killed, perhaps for want of memory" if process.exitcode == -9 else f"exit code {process.exitcode}"
        raise RuntimeError(f"{work.__name__} of {args} ended without an answer: {cause}.") from None
    finally:
        process.join()


def prepare_environment():
    """So that the process that others are forked from finds the benchmarks, and asks for a GPU without starting it."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    here, known = str(Path(__file__).parent), os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if here not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, known)])


def _answer(sender, settings, work, args):
    set_clock(*settings)
    sender.send(work(*args))


def taken_by(work):
    """What repeated calls of a function take, the first of which warms up unless it is long.

    Returns:
        {"resting": bytes held before, "peak": most bytes held, "seconds": median of a call}.
    """
    resting = restart_peak()
    first = seconds(work)
    times = [first] if first > PATIENCE else [seconds(work)]
    while len(times) < MOST_TIMED and first + sum(times) < SECONDS_OF_TIMES:
        times.append(seconds(work))
    return {"resting": resting, "peak": peak_bytes(), "seconds": median(times)}
