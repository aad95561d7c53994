"""A sheet of pictures with their captions underneath, drawn with Pillow alone."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, GAP = 16, 12  # round the sheet, between cells; pixels
LINES = 5  # of a caption at most
BACKGROUND, INK, FRAME = (250, 250, 248), (40, 42, 46), (214, 214, 210)


def grid(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str] | None = None, columns: int = 8, scale: int = 2) -> Image.Image:
    """Lay out uint8 images [N, H, W, 3] in rows of `columns`, each pixel `scale` pixels wide, captions wrapped below.

    Captions longer than five lines end in an ellipsis. ValueError for no images, another shape, or captions of another number.
    """
    pictures = [np.asarray(image) for image in images]
    if not pictures or any(p.dtype != np.uint8 or p.ndim != 3 or p.shape != pictures[0].shape or p.shape[2] != 3 for p in pictures):
        raise ValueError("grid needs at least one image, all uint8 [H, W, 3] of one size")
    if captions is not None and len(captions) != len(pictures):
        raise ValueError(f"{len(pictures)} images but {len(captions)} captions")
    columns, scale = max(1, min(columns, len(pictures))), max(1, scale)
    height, width = pictures[0].shape[0] * scale, pictures[0].shape[1] * scale
    cell = max(width, 112) if captions else width  # room for a few words to a line
    size = max(11, min(22, cell // 10))
    font = _font(size)
    leading = round(size * 1.3)
    texts = [wrap(caption, font, cell, LINES) for caption in captions] if captions else [[] for _ in pictures]
    rows = [range(start, min(start + columns, len(pictures))) for start in range(0, len(pictures), columns)]
    heights = [height + (6 + leading * max(len(texts[i]) for i in row) if captions else 0) for row in rows]
    sheet_size = (2 * MARGIN + columns * cell + (columns - 1) * GAP, 2 * MARGIN + sum(heights) + (len(rows) - 1) * GAP)
    sheet = Image.new("RGB", sheet_size, BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, row_height in zip(rows, heights):
        for column, i in enumerate(row):
            left = MARGIN + column * (cell + GAP) + (cell - width) // 2
            # small pictures stay crisp: every pixel a square
            sheet.paste(Image.fromarray(pictures[i]).resize((width, height), Image.Resampling.NEAREST), (left, top))
            draw.rectangle((left - 1, top - 1, left + width, top + height), outline=FRAME)
            for line, text in enumerate(texts[i]):
                middle = MARGIN + column * (cell + GAP) + cell / 2
                draw.text((middle, top + height + 6 + line * leading), text, INK, font=font, anchor="ma")
        top += row_height + GAP
    return sheet


def framed(images: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures uint8 [H, W, 3] of several shapes in the middle of equal frames: [N, highest H, widest W, 3]; those of one shape as they are."""
    height, width = (max(image.shape[axis] for image in images) for axis in (0, 1))
    frames = np.empty((len(images), height, width, 3), np.uint8)
    frames[:] = FRAME  # so that a white picture ends where it does
    for frame, image in zip(frames, images):
        top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
        frame[top : top + image.shape[0], left : left + image.shape[1]] = image
    return frames


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, lines: int) -> list[str]:
    """Break a text into at most `lines` lines no wider than `width` pixels; what does not fit ends in an ellipsis."""
    rest = " ".join(text.split())[:1000]
    done: list[str] = []
    while rest and len(done) < lines:
        line, rest = _split(rest, font, width)
        if rest and len(done) == lines - 1:
            while line and font.getlength(line + "…") > width:
                line = line[:-1].rstrip()
            line, rest = line + "…", ""
        done.append(line)
    return done


def _split(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> tuple[str, str]:
    """The longest start of `text` that fits, at a blank if there is one, and the rest."""
    if font.getlength(text) <= width:
        return text, ""
    words = text.split(" ")
    count = 0
    while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
        count += 1
    if count:
        return " ".join(words[:count]), " ".join(words[count:])
    end = 1  # one word wider than the line
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    return text[:end], text[end:].lstrip()


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
