"""Every odd kind of image file: right, or dropped with a reason."""

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from flowt2i.data.images import MAX_PIXELS, load_fitted, load_square
from flowt2i.data.sample import Dropped

RED, GREEN, BLUE, WHITE = (220, 30, 30), (20, 180, 60), (30, 60, 220), (255, 255, 255)


def quarters(width: int = 80, height: int = 80) -> Image.Image:
    """Four colours, one in each quarter: shows every turn and flip."""
    image = Image.new("RGB", (width, height), WHITE)
    for box, colour in (((0, 0), RED), ((width // 2, 0), GREEN), ((0, height // 2), BLUE)):
        image.paste(colour, (*box, box[0] + width // 2, box[1] + height // 2))
    return image


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(array: np.ndarray) -> list[tuple[int, ...]]:
    """Colours at the middles of the quarters: top left, top right, bottom left, bottom right."""
    quarter = len(array) // 4
    return [tuple(int(v) for v in array[y, x]) for y in (quarter, -quarter) for x in (quarter, -quarter)]


def reason(data: bytes, **options) -> str:
    with pytest.raises(Dropped) as caught:
        load_square(data, 32, **options)
    return caught.value.reason


def png_header(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + extra + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_plain_formats(kind):
    array = load_square(encode(quarters(), kind), 32)
    assert array.shape == (32, 32, 3) and array.dtype == np.uint8
    for found, wanted in zip(corners(array), (RED, GREEN, BLUE, WHITE)):
        assert np.abs(np.subtract(found, wanted)).max() <= 12, kind


def test_same_size_is_untouched():
    image = quarters(32, 32)
    assert np.array_equal(load_square(encode(image), 32), np.asarray(image))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])  # Pillow turns TIFFs by itself
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    upright = quarters(64, 96)
    # how a camera stores the upright picture under each orientation: the inverse of the turn a viewer makes
    back = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(back[orientation]) if orientation in back else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    array, seen = load_fitted(encode(stored, kind, quality=95, exif=exif if kind == "TIFF" else exif.tobytes()), [(32, 32)])
    assert seen == upright.size
    for found, wanted in zip(corners(array), (RED, GREEN, BLUE, WHITE)):
        assert np.abs(np.subtract(found, wanted)).max() <= 20


def test_broken_exif_is_ignored():
    data = encode(quarters(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert load_square(data, 32).shape == (32, 32, 3)


def test_16_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    image = Image.fromarray(np.tile(ramp, (64, 1)))
    assert image.mode == "I;16"
    row = load_square(encode(image), 64)[10, :, 0]
    assert row[0] == 0 and row[-1] == 255 and abs(int(row[32]) - 130) <= 2


def test_float_tiff():
    image = Image.fromarray(np.tile(np.linspace(0, 1, 64, dtype=np.float32), (64, 1)))
    row = load_square(encode(image, "TIFF"), 64)[10, :, 0]
    assert row[0] == 0 and row[-1] == 255 and abs(int(row[32]) - 130) <= 2


def test_cmyk():
    data = encode(quarters().convert("CMYK"), "JPEG", quality=95)
    for found, wanted in zip(corners(load_square(data, 32)), (RED, GREEN, BLUE, WHITE)):
        assert np.abs(np.subtract(found, wanted)).max() <= 20


def test_transparency_lies_on_white():
    rgba = quarters().convert("RGBA")
    rgba.paste((0, 0, 0, 0), (0, 0, 40, 40))
    assert corners(load_square(encode(rgba), 32)) == [WHITE, GREEN, BLUE, WHITE]
    half = Image.new("RGBA", (40, 40), (0, 0, 0, 128))
    assert abs(int(load_square(encode(half), 32)[5, 5, 0]) - 127) <= 1
    la = Image.merge("LA", (Image.new("L", (40, 40), 0), Image.new("L", (40, 40), 0)))
    assert (load_square(encode(la), 32) == 255).all()


def test_palette_with_transparency():
    palette = quarters().quantize(8)
    index = palette.getpixel((10, 10))
    array = load_square(encode(palette, transparency=index), 32)
    assert corners(array)[0] == WHITE and np.abs(np.subtract(corners(array)[1], GREEN)).max() <= 8


def test_bilevel():
    image = Image.new("1", (64, 64), 1)
    image.paste(0, (0, 0, 32, 64))
    assert corners(load_square(encode(image), 32)) == [(0, 0, 0), WHITE, (0, 0, 0), WHITE]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animated_gives_the_first_frame(kind):
    frames = [Image.new("RGB", (64, 64), colour) for colour in (RED, GREEN, BLUE)]
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
    assert np.abs(np.subtract(corners(load_square(data, 32))[0], RED)).max() <= 12


def test_centre_crop():
    wide = Image.new("RGB", (120, 40), RED)
    wide.paste(GREEN, (40, 0, 80, 40))  # the middle square
    assert (load_square(encode(wide), 40) == GREEN).all()
    tall = wide.transpose(Image.Transpose.ROTATE_90)
    assert (load_square(encode(tall), 40) == GREEN).all()


def test_resize_is_antialiased():
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255  # without a filter: all black or all white
    array = load_square(encode(Image.fromarray(stripes)), 64)
    assert np.abs(array.astype(int) - 127).max() <= 6


def test_large_jpeg_equals_its_full_decode():
    """Draft mode decodes at a fraction; the result must look the same."""
    y, x = np.mgrid[0:1024, 0:1024]
    image = Image.fromarray(np.stack([x // 4, y // 4, (x + y) // 8], -1).astype(np.uint8))
    slow = np.asarray(Image.open(io.BytesIO(encode(image, "JPEG", quality=95))).resize((64, 64), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(load_square(encode(image, "JPEG", quality=95), 64) - slow).max() <= 3


def test_too_small_and_too_long():
    assert reason(encode(Image.new("RGB", (16, 300))), min_side=32) == "too small"
    assert reason(encode(Image.new("RGB", (1, 4000))), max_aspect=3) == "aspect ratio"
    assert load_square(encode(Image.new("RGB", (1, 4000), RED)), 32).shape == (32, 32, 3)  # allowed where no filter forbids it


@pytest.mark.parametrize("side", [9460, 10_000, 13_500, 60_000])  # from just over the limit, where Pillow only warns
def test_decompression_bombs_are_refused_by_their_header(side):
    assert side**2 > MAX_PIXELS
    assert reason(png_header(side, side)) == "too many pixels"


def test_gif_frame_larger_than_its_screen():
    data = bytearray(encode(Image.new("P", (8, 8)), "GIF"))
    at = data.index(b"\x2c")  # the image descriptor: left, top, width, height
    data[at + 5 : at + 9] = struct.pack("<HH", 65_000, 65_000)
    assert reason(bytes(data)) in ("too many pixels", "undecodable image")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html><body>404</body></html>",
        b"\xff\xd8\xff\xe0",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
        encode(quarters())[:120],
        encode(quarters(), "JPEG")[:-400],
        png_header(64, 64),
        b"\x89PNG\r\n\x1a\n" + b"\0" * 64,
        bytes(range(256)) * 8,
    ],
    ids=["empty", "html", "jpeg head", "eps", "cut png", "cut jpeg", "png without pixels", "png zeros", "noise"],
)
def test_undecodable(data):
    assert reason(data) == "undecodable image"


def test_flipped_bytes_never_crash():
    random = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF"):
        whole = encode(quarters(), kind)
        for _ in range(60):
            data = bytearray(whole)
            for place in random.integers(0, len(data), 3):
                data[place] = random.integers(256)
            try:
                assert load_square(bytes(data), 16).shape == (16, 16, 3)
            except Dropped:
                pass


@pytest.mark.slow
def test_memory_of_the_largest_images_allowed():
    """The worst kinds just under the pixel limit stay below 2 GiB."""
    code = """
import io, resource
from PIL import Image
Image.MAX_IMAGE_PIXELS = None
from flowt2i.data.images import load_square
for mode, kind in (("P", "PNG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("F", "TIFF"), ("CMYK", "JPEG"), ("RGB", "WEBP")):
    image = Image.new(mode, (16000, 5500) if kind == "WEBP" else (9450, 9450))
    file = io.BytesIO()
    image.save(file, kind, **({"transparency": 0} if mode == "P" else {"method": 0} if kind == "WEBP" else {}))
    open("/proc/self/clear_refs", "w").write("5")
    del image
    load_square(file.getvalue(), 64)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(mode, int(peak.split()[1]) // 1024, flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        assert int(line.split()[1]) < 2048, done.stdout
