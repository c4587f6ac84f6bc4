"""How a teacher's variance is spread over its channels, block by block: what a centred cosine listens to.

A cosine weighs channels by their variance. Where one channel holds nearly all of it, a student that knows that channel
alone has nearly the perfect score, unless features are standardized (`teacher.standardize`).

    python benchmarks/teacher_channels.py --teacher google/vit-base-patch16-224 --data FOLDER/flickr8k/val*.parquet
"""

import torch
from rows import arguments, parser_of, report, row

from vora.data.sources import load_source
from vora.distill.blockwise import SUMMARY
from vora.distill.teacher import Teacher


def main():
    parser = parser_of(__doc__)
    parser.add_argument("--teacher", required=True, help="hub id or folder of a ViT")
    parser.add_argument("--data", required=True, help="pictures, as data.sources takes them")
    parser.add_argument("--count", type=int, default=50, help="pictures")
    args = arguments(parser)
    teacher, source = Teacher.from_pretrained(args.teacher), load_source(args.data, max_samples=args.count)
    side = round(len(teacher.embedding.position) ** 0.5) if teacher.embedding.position is not None else 16
    blocks = [*range(teacher.num_blocks), SUMMARY]
    pictures = [as_tensor(source[i].open_images()[0], side * teacher.patch_size) for i in range(len(source))]
    features = teacher(pictures, [(side, side)] * len(pictures), blocks)
    report([of_block(block, features[block].float()) for block in blocks], args.json)


def as_tensor(image, side):
    """A picture as float[3, side, side] in 0..1."""
    pixels = torch.frombuffer(bytearray(image.resize((side, side)).tobytes()), dtype=torch.uint8)
    return pixels.view(side, side, 3).permute(2, 0, 1).float() / 255


def of_block(block, features):
    """The centred cosine with the features of a student that knows only the channel of most variance, as it is (the
    baseline) and on standardized features (ours); 0 is what such a student should get."""
    centred = features - features.mean(0)
    variance = centred.square().mean(0)
    top = int(variance.argmax())
    alone = torch.zeros_like(features)
    alone[:, top] = centred[:, top]
    deviation = variance.sqrt().clamp_min(1e-6)
    cosines = [torch.cosine_similarity(alone / scale, centred / scale).mean().item() for scale in (deviation, 1.0)]
    what = "summary" if block == SUMMARY else f"block {block + 1}"
    return row(
        f"{what}: credit for one channel", *cosines, "cosine", top_share=(variance[top] / variance.sum()).item()
    )


if __name__ == "__main__":
    main()
