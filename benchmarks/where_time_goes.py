"""Where a training step's time goes: by kind of work, and the operations that take most.

On a GPU kernels are counted, on a CPU operations of torch; each by the time it takes itself.
"""

import re

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# A name is of the first kind whose pattern it has.
KINDS = {
    "losses": r"log_?softmax|nll|cross_entropy|cosine",
    "attention": r"attention|attn|flash|fmha|flex|bmm|softmax",
    "matrix products": r"gemm|gemv|nvjet|cutlass|cublas|xmma|::mm\b|addmm|matmul|linear|conv",
    "optimizer and clipping": r"adam|multi_tensor|foreach",
    "copies and casts": r"copy|memcpy|memset|cast|::cat|clone|index|gather|scatter|embedding",
    "norms, activations, sums": r"norm|silu|gelu|elementwise|reduce|mul|add|sum|mean|pow|rsqrt|div|sub|neg|triton",
    "rest": "",
}


def profiled(work):
    """torch's profile of one call."""
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=kinds) as found:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return found.key_averages()


def seconds_by_kind(events):
    """{kind of work: seconds} of a profile: of its kernels on a GPU, of its operations on a CPU."""
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    times = dict.fromkeys(KINDS, 0.0)
    for event in kernels or events:
        times[kind_of(event.key)] += (event.self_device_time_total if kernels else event.self_cpu_time_total) / 1e6
    return times


def kind_of(name):
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def table(events, num_lines=25):
    """The operations that take most, as text."""
    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return events.table(sort_by=key, row_limit=num_lines, max_name_column_width=60)
