"""Which student block imitates which teacher block, and how well: the block-wise distillation of VoRA.

Dims: T image tokens of the batch, D = the student's width, D_t = the teacher's.
"""

import torch
import torch.nn.functional as F
from torch import nn

SHIFTS = {"outputs": (0, 0), "inputs": (-1, 0), "hidden_states": (-1, -1)}  # of (student, teacher)


def block_pairs(num_student_blocks, num_teacher_blocks, spread=False, pairing="outputs"):
    """(student block, teacher block) pairs, outputs with outputs; block -1 stands for what enters the first block.

    Block i of the student imitates block i of the teacher, as many as the shallower of the two has (section 3.2 of
    the paper, without its released code's shift by one). With `spread`, the shallower one's blocks are spaced evenly
    over the deeper one's, last with last.

    Two other values of `pairing` repeat the released code, which zips the student's list of hidden states, in which
    entry i enters block i, with its teacher's. "inputs": what enters block i of the student imitates the output of
    the teacher's block i (AIMv2's own code, whose list has no embeddings). "hidden_states": what enters block i
    imitates what enters the teacher's block i (teachers of transformers, CLIP among them).

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

    def spaced(depth):
        return [round((i + 1) * depth / count) - 1 for i in range(count)]

    return list(zip(spaced(num_student_blocks), spaced(num_teacher_blocks)))


class BlockwiseDistillation(nn.Module):
    """One head (norm and linear) per pair and the loss 1 - cosine, mean over tokens, then over pairs.

    Args:
        pairs: from `block_pairs`.
        center: subtract a running per-channel mean of the teacher's features first. Features of plain ViTs share a
            large common part, so that without this a student scores by predicting the mean (docs/LOG.md).
        momentum: of that running mean, per step.
    """

    def __init__(self, pairs, student_size, teacher_size, center=True, momentum=0.99):
        super().__init__()
        self.pairs = list(pairs)
        self.center = center
        self.momentum = momentum
        self.heads = nn.ModuleDict(
            {
                str(student): nn.Sequential(nn.RMSNorm(student_size, eps=1e-5), nn.Linear(student_size, teacher_size))
                for student, _ in self.pairs
            }
        )
        for student, _ in self.pairs:
            self.register_buffer(f"mean_{student}", torch.zeros(teacher_size))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.long))

    def forward(self, student_states, teacher_states):
        """The mean loss and each pair's own.

        Args:
            student_states: {student block: float[T, D]}.
            teacher_states: {teacher block: float[T, D_t]}.

        Returns:
            (float[], float[pairs]): the first is the mean of the second; 0 is perfect, 1 is chance.
        """
        if self.training and self.center:
            self._update_means(teacher_states)
        losses = []
        for student, teacher in self.pairs:
            target = teacher_states[teacher].float()
            if self.center:
                target = target - getattr(self, f"mean_{student}")
            predicted = self.heads[str(student)](student_states[student].to(self._dtype))
            losses.append(1 - F.cosine_similarity(predicted.float(), target, dim=-1).mean())
        losses = torch.stack(losses)
        return losses.mean(), losses.detach()

    @property
    def _dtype(self):
        return next(self.heads.parameters()).dtype

    @torch.no_grad()
    def _update_means(self, teacher_states):
        self.num_updates += 1
        # the first steps average evenly, so that the mean is right from the start
        weight = torch.clamp(1.0 / self.num_updates, min=1 - self.momentum)
        for student, teacher in self.pairs:
            mean = getattr(self, f"mean_{student}")
            mean.lerp_(teacher_states[teacher].float().mean(0), weight.to(mean))
