"""A training loop of your own: an LLM learns to see from a ViT, and from captions or questions about images.

python examples/own_loop.py LLM VIT DATA OUT [EPOCHS]
# DATA: .jsonl, .csv or .parquet with image (a path) and caption, or question and answer"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset

import vora

llm, vit, data, out, *epochs = sys.argv[1:]
teacher = vora.Teacher.from_pretrained(vit)
model = vora.from_llm(llm, teacher=teacher)
processor = vora.VoraProcessor.from_llm(llm, teacher=teacher)
student = vora.attach_vision_lora(model, rank=16, num_blocks=teacher.num_blocks)
pairs = [(block, block) for block in range(teacher.num_blocks)]  # of student and teacher
distillation = vora.BlockwiseDistillation(pairs, model.config.get_text_config().hidden_size, teacher.hidden_size)
objective = vora.Objective(student, processor.image_processor, teacher, distillation)
optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)

rows = load_dataset(Path(data).suffix[1:].replace("jsonl", "json"), data_files=data, split="train")
for epoch in range(int(epochs[0]) if epochs else 10):
    for number, row in enumerate(rows):
        image = {"type": "image", "image": str(Path(data).parent / row["image"])}
        question = {"type": "text", "text": row.get("question") or "Describe the image."}
        answer = {"role": "assistant", "content": row.get("answer") or row["caption"]}
        sample = processor.training_sample([{"role": "user", "content": [image, question]}, answer])
        batch = {name: torch.as_tensor(value) for name, value in sample.items()}
        targets = batch.pop("labels").roll(-1)  # the next token at every place; the first has no label
        losses = objective(targets=targets[None], input_ids=batch.pop("input_ids")[None], **batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 20 == 0:
            print(f"epoch {epoch} row {number}", *(f"{n} {losses[n]:.3f}" for n in ("lm_loss", "distill_loss")))
vora.merge_vision_lora(student).save_pretrained(out)
processor.save_pretrained(out)
