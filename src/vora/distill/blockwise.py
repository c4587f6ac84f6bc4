"""Which student block imitates which teacher block, and how well: the block-wise distillation of VoRA.

Dims: T image tokens of the batch, D = the student's width, D_t = the teacher's.
"""

from collections.abc import Iterable, Mapping, Sequence
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
        momentum: of these running moments, per step. A step's losses are taken with the moments of the steps before,
            so that they do not depend on how its micro-batches are shared out among processes; those of the first
            step with its own (`begin`).

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
        self.has_moments = False  # whether features have been seen before, which the host knows without a look
        self._sums: Tensor | None = None  # of the step's micro-batches so far, see `_add`
        self._num_added = 0

    def forward(
        self, student_states: Mapping[int, Tensor], teacher_states: Mapping[int | str, Tensor],
        num_micro_batches: int = 1,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The mean loss float[] and each pair's own float[pairs]; 0 is perfect, 1 is chance.

        Args:
            student_states: {student block: float[T, D]}.
            teacher_states: {teacher block or SUMMARY: float[T, D_t]}.
            num_micro_batches: of the optimizer step, after which the moments move.
        """
        if self.training and self.center and not self.has_moments:
            self.begin([teacher_states])
        # copies, since what is recomputed in the backward pass has to find the same once the moments have moved
        moments = {pair: [moment.clone() for moment in self._moments(pair)] for pair in self.pairs}
        loss_of = self.loss_of_pair
        if self.recomputes:
            loss_of = partial(checkpoint, self.loss_of_pair, use_reentrant=False, preserve_rng_state=False)
        losses = torch.stack(
            [loss_of(pair, student_states[pair[0]], teacher_states[pair[1]], moments[pair]) for pair in self.pairs]
        )
        if self.training and self.center:
            self._add(teacher_states, num_micro_batches)
        return losses.mean(), losses.detach()

    def loss_of_pair(
        self, pair: Pair, states: Tensor, features: Tensor, moments: Sequence[Tensor] | None = None
    ) -> Tensor:
        """1 - cosine between what a pair's head makes of float[T, D] and its target of float[T, D_t], mean over T; by
        default with the moments as they are."""
        head: Any = self.heads[name_of(pair)]
        norm, linear = head
        if computing_dtype(linear.weight) == linear.weight.dtype:  # no autocast
            states = states.to(linear.weight.dtype)
        # the norm's weights go into the product and its scale behind it, where there is less to multiply
        length = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / states.shape[-1] + norm.eps).rsqrt()
        predicted = F.linear(states, linear.weight * norm.weight) * scale + linear.bias
        return 1 - F.cosine_similarity(predicted.float(), self.target(pair, features, moments), dim=-1).mean()

    def target(self, pair: Pair, features: Tensor, moments: Sequence[Tensor] | None = None) -> Tensor:
        """What a pair's head is to point at: float[T, D_t], centred and standardized if so wished."""
        target, moments = features.float(), self._moments(pair) if moments is None else moments
        if self.center:
            target = target - moments[0]
        if self.standardize:
            target = target * (moments[1] + 1e-6).rsqrt()
        return target

    def _moments(self, pair: Pair) -> list[Tensor]:
        """The running mean of a pair's teacher, and its variance, as far as they are wished."""
        kinds = ["mean"] * self.center + ["variance"] * self.standardize
        return [getattr(self, f"{kind}_{name_of(pair)}") for kind in kinds]

    def without_images(self, num_micro_batches: int = 1) -> None:
        """In place of `forward`, for a micro-batch that has none: other processes may wait for this one's part."""
        if self.training and self.center:
            if not self.has_moments and num_processes() > 1:
                self.begin([])
            self._add({}, num_micro_batches)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.has_moments = bool(state_dict.get(f"{prefix}num_updates", 0) > 0)

    @torch.no_grad()
    def begin(self, micro_batches: Iterable[Mapping[int | str, Tensor]]) -> None:
        """Take the first moments, of what the micro-batches of all processes together have, if they have something.
        Without it the first step would be taken with none."""
        for pair in self.pairs:
            self._moments(pair)[0].zero_()
        sums = self._sums_of({}, torch.float64)
        for teacher_states in micro_batches:
            sums += self._sums_of(teacher_states, torch.float64)
        means, squares, count = sum_over_processes(sums)
        if num_processes() > 1 and count == 0:
            return
        for pair, mean, square in zip(self.pairs, means, squares):
            moments = self._moments(pair)
            moments[0] += mean
            if self.standardize:
                moments[1].copy_(square - mean.square())
        self.has_moments = True

    @torch.no_grad()
    def _add(self, teacher_states: Mapping[int | str, Tensor], num_micro_batches: int) -> None:
        """Take a micro-batch's features into the step's; after its last one, those of all processes into the running
        moments."""
        found = self._sums_of(teacher_states, torch.float32)
        self._sums = found if self._sums is None else self._sums + found
        self._num_added += 1
        if self._num_added < num_micro_batches:
            return
        means, squares, count = sum_over_processes(self._sums)
        self._sums, self._num_added = None, 0
        is_some = count > 0
        self.num_updates += is_some
        # the first steps average evenly, so that the mean is right from the start
        weight = is_some * torch.clamp(1.0 / self.num_updates.clamp(min=1), min=1 - self.momentum)
        for pair, mean, square in zip(self.pairs, means, squares):
            moments, moved = self._moments(pair), weight * mean
            moments[0] += moved
            if self.standardize:  # around the mean as it is now, also of the features of the steps before
                moments[1].lerp_(square, weight.to(mean)).sub_(moved.square())

    def _sums_of(self, teacher_states: Mapping[int | str, Tensor], dtype: torch.dtype) -> Tensor:
        """float[pairs, 2 D_t + 1] of a micro-batch: how far its features are from the running means, summed, the
        squares of that, and the number of features."""
        sums = []
        for pair in self.pairs:
            mean = self._moments(pair)[0]
            rows = teacher_states.get(pair[1], mean.new_zeros((0, len(mean)))).to(dtype) - mean
            count = rows.new_full((1,), len(rows))
            squares = rows.square().sum(0) if self.standardize else rows.new_zeros(len(mean))
            sums.append(torch.cat([rows.sum(0), squares, count]))
        return torch.stack(sums)


def num_processes() -> int:
    """Of the group that trains together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of what `BlockwiseDistillation._sums_of` gave: means and mean squares float[pairs, D_t] over the features of all
    processes of a group, each feature counting alike, and their number. Without it each process would follow its own
    samples, or the first one's alone."""
    if num_processes() > 1:
        dist.all_reduce(sums)
    width, count = sums.shape[1] // 2, sums[0, -1]
    means = sums[:, :-1] / count.clamp(min=1)
    return means[:, :width], means[:, width:], count
