"""A distillation weight that falls while a run goes on, so that words have the last say."""

from transformers import TrainerCallback


class DistillWeightDecay(TrainerCallback):
    """Sets the learner's `distill_weight` before each step: `teacher.weight` until pictures alone are done and in the
    first step after them, from there on a straight line to `teacher.weight_end` in step `training.max_steps`. It
    depends on the number of the step alone, so that a resumed run goes on with the same weights."""

    def __init__(self, teacher):
        self.first, self.start, self.end = teacher.image_only_steps, teacher.weight, teacher.weight_end

    def weight(self, step, max_steps):
        """Of a step, the first of which is 0."""
        share = (step - self.first) / max(1, max_steps - 1 - self.first)
        return self.start + min(1.0, max(0.0, share)) * (self.end - self.start)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.distill_weight = self.weight(state.global_step, state.max_steps)
