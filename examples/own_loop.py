"""A training loop of your own: an LLM learns to see from a ViT, and from questions about images with their answers.

    python examples/own_loop.py LLM VIT DATA.jsonl OUT     # rows with image, question, answer

Without packing and batches, so slower than `vora train`, but every step is in sight.
"""

import json
import sys
from pathlib import Path

import torch

import vora

llm, vit, data, out = sys.argv[1:]
teacher = vora.Teacher.from_pretrained(vit)
model = vora.from_llm(llm, teacher=teacher)
processor = vora.VoraProcessor.from_llm(llm, teacher=teacher)
student = vora.attach_vision_lora(model, rank=16, num_blocks=teacher.num_blocks)
pairs = [(block, block) for block in range(teacher.num_blocks)]  # of student and teacher
distillation = vora.BlockwiseDistillation(pairs, model.config.get_text_config().hidden_size, teacher.hidden_size)
objective = vora.Objective(student, processor.image_processor, teacher, distillation)
optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], lr=3e-3)

rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
for epoch in range(10):
    for row in rows:
        image = {"type": "image", "image": str(Path(data).parent / row["image"])}
        question = {"role": "user", "content": [image, {"type": "text", "text": row["question"]}]}
        sample = processor.training_sample([question, {"role": "assistant", "content": row["answer"]}])
        batch = {name: torch.as_tensor(value) for name, value in sample.items()}
        targets = batch.pop("labels").roll(-1)  # the next token at every place; the first has no label
        losses = objective(targets=targets[None], input_ids=batch.pop("input_ids")[None], **batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: lm_loss {losses['lm_loss']:.3f}, distill_loss {losses['distill_loss']:.3f}")
vora.merge_vision_lora(student).save_pretrained(out)
processor.save_pretrained(out)
