"""Which student block imitates which teacher block, and how well: the block-wise distillation of VoRA.

Dims: T image tokens of the batch, D = the student's width, D_t = the teacher's.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vora.model.segmented_sdpa import computing_dtype

SUMMARY = "summary"  # in the place of a teacher's block: its CLS token's last state, at every image token
Pair = tuple[int, int | str]  # the student's block, the teacher's
SHIFTS = {"outputs": (0, 0), "inputs": (-1, 0), "hidden_states": (-1, -1)}  # of (student, teacher)


def block_pairs(
    num_student_blocks: int, num_teacher_blocks: int, spread: bool = False, pairing: str = "outputs"
) -> list[Pair]:
    """(student block, teacher block) pairs, outputs with outputs; block -1 stands for what enters the first block.

    Block i of the student imitates block i of the teacher, as many as the shallower of the two has (section 3.2 of
    the paper, without its released code's shift by one). With `spread`, the shallower one's blocks are spaced evenly
    over the deeper one's, last with last.

    Two other values of `pairing` repeat the released code. "inputs": what enters block i of the student imitates the
    output of the teacher's block i (AIMv2's own code). "hidden_states": what enters block i imitates what enters the
    teacher's block i (teachers of transformers, CLIP among them).

    >>> block_pairs(3, 5)
    [(0, 0), (1, 1), (2, 2)]
    >>> block_pairs(3, 6, spread=True)
    [(0, 1), (1, 3), (2, 5)]
    >>> block_pairs(3, 3, pairing="inputs")
    [(-1, 0), (0, 1), (1, 2)]
    >>> block_pairs(3, 3, pairing="hidden_states")
    [(-1, -1), (0, 0), (1, 1)]

    Raises:
        ValueError: an unknown pairing, or one of the released code's with `spread`.
    """
    count = min(num_student_blocks, num_teacher_blocks)
    if pairing not in SHIFTS:
        raise ValueError(f"pairing {pairing!r} is unknown: choose among {', '.join(SHIFTS)}.")
    if spread and pairing != "outputs":
        raise ValueError(f"pairing {pairing} repeats the released code, which knows no spread: leave one of them out.")
    if not spread:
        student, teacher = SHIFTS[pairing]
        return [(i + student, i + teacher) for i in range(count)]

    def spaced(depth: int) -> list[int]:
        return [round((i + 1) * depth / count) - 1 for i in range(count)]

    return list(zip(spaced(num_student_blocks), spaced(num_teacher_blocks)))


def name_of(pair: Pair) -> str:
    """What a pair's head and moments are called: by the student's block, or `summary`."""
    student, teacher = pair
    return SUMMARY if teacher == SUMMARY else str(student)


class BlockwiseDistillation(nn.Module):
    """One head (norm and linear) per pair and the loss 1 - cosine, mean over tokens, then over pairs.

    Args:
        pairs: from `block_pairs`; a pair with `SUMMARY` imitates the teacher's summary of the whole image.
        center: subtract a running per-channel mean of the teacher's features first. Features of plain ViTs share a
            large common part, so that without this a student scores by predicting the mean (dev/LOG.md).
        standardize: then divide by the running per-channel deviation. In the later blocks of plain ViTs one or two
            channels hold nearly all of the variance, so that without this a student scores by predicting those.
        momentum: of these running moments, per step.

    Raises:
        ValueError: deviations are asked for without means.
    """

    num_updates: Tensor

    def __init__(
        self, pairs: Iterable[Pair], student_size: int, teacher_size: int, center: bool = True,
        standardize: bool = False, momentum: float = 0.99,
    ) -> None:  # fmt: skip
        super().__init__()
        if standardize and not center:
            raise ValueError("To standardize the teacher's features is to center them too: set center=True.")
        self.pairs, self.center, self.standardize, self.momentum = list(pairs), center, standardize, momentum
        self.recomputes = False  # heads in the backward pass, see `Objective.gradient_checkpointing_enable`
        self.heads = nn.ModuleDict()
        for pair in self.pairs:
            head = nn.Sequential(nn.RMSNorm(student_size, eps=1e-5), nn.Linear(student_size, teacher_size))
            self.heads[name_of(pair)] = head
            self.register_buffer(f"mean_{name_of(pair)}", torch.zeros(teacher_size))
            if standardize:
                self.register_buffer(f"variance_{name_of(pair)}", torch.ones(teacher_size))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(
        self, student_states: Mapping[int, Tensor], teacher_states: Mapping[int | str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The mean loss float[] and each pair's own float[pairs]; 0 is perfect, 1 is chance.

        Args:
            student_states: {student block: float[T, D]}.
            teacher_states: {teacher block or SUMMARY: float[T, D_t]}.
        """
        if self.training and self.center:
            self._update_moments(teacher_states)
        loss_of = self.loss_of_pair
        if self.recomputes:
            loss_of = partial(checkpoint, self.loss_of_pair, use_reentrant=False, preserve_rng_state=False)
        losses = torch.stack([loss_of(pair, student_states[pair[0]], teacher_states[pair[1]]) for pair in self.pairs])
        return losses.mean(), losses.detach()

    def loss_of_pair(self, pair: Pair, states: Tensor, features: Tensor) -> Tensor:
        """1 - cosine between what a pair's head makes of float[T, D] and its target of float[T, D_t], mean over T."""
        head: Any = self.heads[name_of(pair)]
        norm, linear = head
        if computing_dtype(linear.weight) == linear.weight.dtype:  # no autocast
            states = states.to(linear.weight.dtype)
        # the norm's weights go into the product and its scale behind it, where there is less to multiply
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / states.shape[-1] + norm.eps).rsqrt()
        predicted = F.linear(states, linear.weight * norm.weight) * scale + linear.bias
        return 1 - F.cosine_similarity(predicted.float(), self.target(pair, features), dim=-1).mean()

    def target(self, pair: Pair, features: Tensor) -> Tensor:
        """What a pair's head is to point at: float[T, D_t], centred and standardized if so wished."""
        target = features.float()
        if self.center:
            target = target - getattr(self, f"mean_{name_of(pair)}")
        if self.standardize:
            target = target * (getattr(self, f"variance_{name_of(pair)}") + 1e-6).rsqrt()
        return target

    def without_images(self) -> None:
        """In place of `forward`, for a micro-batch that has none: other processes may wait for this one's part."""
        if self.training and self.center and num_processes() > 1:
            self._update_moments({})

    @torch.no_grad()
    def _update_moments(self, teacher_states: Mapping[int | str, Tensor]) -> None:
        """Take the features of a micro-batch of each process, all together, into the running moments."""
        none = self.num_updates.new_zeros((0, 1), dtype=torch.float32)
        means = [getattr(self, f"mean_{name_of(pair)}") for pair in self.pairs]
        features = [teacher_states.get(teacher, none.expand(0, len(means[0]))).float() for _, teacher in self.pairs]
        found, is_some = means_of_all(features)
        self.num_updates += is_some
        # the first steps average evenly, so that the mean is right from the start
        weight = is_some * torch.clamp(1.0 / self.num_updates.clamp(min=1), min=1 - self.momentum)
        for mean, now in zip(means, found):
            mean.lerp_(now, weight.to(mean))
        if self.standardize:
            found, _ = means_of_all([(rows - mean).square() for rows, mean in zip(features, means)])
            for pair, now in zip(self.pairs, found):
                variance = getattr(self, f"variance_{name_of(pair)}")
                variance.lerp_(now, weight.to(variance))


def num_processes() -> int:
    """Of the group that trains together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def means_of_all(rows: list[Tensor]) -> tuple[list[Tensor], Tensor | bool]:
    """The means of several float[T, D] over their rows, of all processes of a group together, each row counting alike,
    and whether any process has some. Without it each would follow its own samples, or the first one's alone."""
    if num_processes() == 1:
        return [one.mean(0) for one in rows], True
    sums = torch.stack([torch.cat([one.sum(0), one.new_full((1,), len(one))]) for one in rows])
    dist.all_reduce(sums)
    return list(sums[:, :-1] / sums[:, -1:].clamp(min=1)), sums[0, -1] > 0
