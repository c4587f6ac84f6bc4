"""Fixed pictures, answered at every evaluation, so that a person can watch the model learn."""

import json
from pathlib import Path

import torch
from rich.markup import escape
from transformers import TrainerCallback

from vora.model.image_processing_vora import read_image


class WatchCallback(TrainerCallback):
    """Answers the recipe's watched pictures at each save or evaluation and at the end.

    Raises:
        ValueError: a watched picture cannot be read; at once, before training.
    """

    def __init__(self, watched, processor, log_file, console):
        self.watched = [(read_image(entry.image), entry) for entry in watched]
        self.processor, self.log_file, self.console = processor, Path(log_file), console

    def on_save(self, args, state, control, model=None, **kwargs):
        if not self.watched or not state.is_world_process_zero:
            return
        learner = model.module if hasattr(model, "module") else model
        answers = [self.answer(learner.vora, image, entry.question) for image, entry in self.watched]
        learner.train()
        with self.log_file.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "answers": answers}) + "\n")
        for (_, entry), answer in zip(self.watched, answers):
            asked = escape(f"{Path(entry.image).name}: {entry.question}")  # a model may say [/INST]
            self.console.print(f"  {asked} [bold]{escape(answer)}[/bold]")

    @torch.inference_mode()
    def answer(self, model, image, question, max_new_tokens=24):
        """A greedy answer to a question about a picture."""
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
