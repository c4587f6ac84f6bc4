"""Fixed images, answered at every evaluation, so that a person can watch the model learn."""

import json
from pathlib import Path

import torch
from rich.markup import escape
from transformers import TrainerCallback

from vora.model.fetch_image import fetch_image


class SampleGenerationCallback(TrainerCallback):
    """Answers the recipe's watched images at each save or evaluation and at the end.

    Raises:
        ValueError: a watched image cannot be read; at once, before training.
    """

    def __init__(self, samples_shown, processor, log_file, console):
        self.samples_shown = [(fetch_image(entry.image), entry) for entry in samples_shown]
        self.processor, self.log_file, self.console = processor, Path(log_file), console

    def on_save(self, args, state, control, model=None, **kwargs):
        if not self.samples_shown or not state.is_world_process_zero:
            return
        learner = model.module if hasattr(model, "module") else model
        answers = [self.answer(learner.vora, image, entry.question) for image, entry in self.samples_shown]
        learner.train()
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "answers": answers}) + "\n")
        for (_, entry), answer in zip(self.samples_shown, answers):
            asked = escape(f"{Path(entry.image).name}: {entry.question}")  # a model may say [/INST]
            self.console.print(f"  {asked} [bold]{escape(answer)}[/bold]")

    @torch.inference_mode()
    def answer(self, model, image, question, max_new_tokens=24):
        """A greedy answer to a question about an image."""
        model.eval()
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
