"""Images to try a model with, drawn here."""

from PIL import Image, ImageDraw, ImageFilter

SIDE = 384


def example_images() -> dict[str, tuple[Image.Image, str]]:
    """Images and a question about each, by name."""
    return {
        "Meadow": (_meadow(), "Describe the image."),
        "Sea": (_sea(), "Describe the image."),
        "Circle": (_circle(), "What is the color of the circle?"),
        "Shapes": (_shapes(), "What shape is in the image?"),
    }


def _gradient(top: str, bottom: str) -> Image.Image:
    """From one colour above to another below."""
    mask = Image.linear_gradient("L").resize((SIDE, SIDE))
    return Image.composite(Image.new("RGB", (SIDE, SIDE), bottom), Image.new("RGB", (SIDE, SIDE), top), mask)


def _sea() -> Image.Image:
    image, water = _gradient("#35508c", "#ffb36b"), _gradient("#e08a4c", "#123456")
    draw = ImageDraw.Draw(image)
    draw.ellipse((150, 170, 234, 254), fill="#fff1b8")
    image.paste(water.resize((SIDE, 172)), (0, 212))
    draw.polygon([(0, 384), (0, 350), (170, 330), (384, 362), (384, 384)], fill="#c9a877")
    for row, (y, half) in enumerate([(222, 40), (238, 30), (256, 22), (278, 14)]):
        draw.line([(192 - half + 6 * row, y), (192 + half, y)], fill="#ffd9a0", width=4)
    return image.filter(ImageFilter.GaussianBlur(1.2))


def _meadow() -> Image.Image:
    image = _gradient("#4f9be8", "#d4ecff")
    draw = ImageDraw.Draw(image)
    for x, y, size in ((60, 60, 30), (90, 50, 38), (128, 64, 28), (270, 96, 26), (300, 88, 32)):
        draw.ellipse((x - size, y - size // 2, x + size, y + size // 2), fill="white")
    draw.polygon([(0, 250), (120, 190), (240, 240), (384, 170), (384, 384), (0, 384)], fill="#4a8f4d")
    image.paste(_gradient("#6fb04a", "#2f6d2a").resize((SIDE, 134)), (0, 250))
    draw.rectangle((292, 160, 306, 262), fill="#6b4a2b")
    draw.ellipse((250, 84, 348, 196), fill="#2f7d36")
    draw.ellipse((96, 276, 168, 312), fill="#8a5a33")  # a dog
    draw.ellipse((152, 256, 186, 288), fill="#8a5a33")
    for x in (104, 118, 146, 158):
        draw.rectangle((x, 300, x + 6, 332), fill="#7a4d2a")
    return image.filter(ImageFilter.GaussianBlur(1.0))


def _circle() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#2f8f83")  # so that the mean colour tells nothing of the circle's
    ImageDraw.Draw(image).ellipse((96, 96, 288, 288), fill="#d62828")
    return image


def _shapes() -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "#e9eef5")
    draw = ImageDraw.Draw(image)
    draw.rectangle((48, 60, 180, 192), fill="#1d6fb8")
    draw.polygon([(290, 210), (210, 350), (370, 350)], fill="#2a9d5c")
    return image
