"""A training loop of your own: an LLM learns to see from a ViT, and from captions or questions about images.

DATA is whatever a recipe's source may be: a CSV, Parquet or JSON Lines file, a folder of images, a dataset's id."""

import argparse
import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # before torch: else threads of a shared processor wait and wait
import torch

import vora

parser = argparse.ArgumentParser(description=__doc__)
for name, what in (("llm", "alias, folder or hub id"), ("vit", "teacher"), ("data", ""), ("out", "folder")):
    parser.add_argument(name, help=what)
parser.add_argument("--epochs", type=int, default=10)
args = parser.parse_args()
teacher = vora.Teacher.from_pretrained(args.vit)
model = vora.from_llm(args.llm, teacher=teacher)
processor = vora.VoraProcessor.from_llm(args.llm, teacher=teacher)
student = vora.attach_vision_lora(model, rank=16, num_blocks=teacher.num_blocks)
pairs = [(block, block) for block in range(teacher.num_blocks)]  # of student and teacher
distillation = vora.BlockwiseDistillation(pairs, model.config.get_text_config().hidden_size, teacher.hidden_size)
objective = vora.Objective(student, processor.image_processor, teacher, distillation)
optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)
rows = vora.load_source(args.data)
for epoch in range(args.epochs):
    for number, row in enumerate(rows):
        sample = processor.training_sample(row.messages(row.open_images(), row.conversations[0]))
        batch = {name: torch.as_tensor(value) for name, value in sample.items()}
        targets = batch.pop("labels").roll(-1)  # the next token at every place; the first has no label
        losses = objective(targets=targets[None], input_ids=batch.pop("input_ids")[None], **batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            said = [f"{name} {losses[name]:.3f}" for name in ("lm_loss", "distill_loss") if name in losses]
            print(f"epoch {epoch} row {number}", *said)
vora.merge_vision_lora(student).save_pretrained(args.out)
processor.save_pretrained(args.out)
