"""Single images: what is decoded how, and what is refused as unreadable."""

import copy
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from visattn.train.listing import list_folder
from visattn.train.sources import EXTENSIONS, BadImageError, FolderSource, TarSource

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (24, 20, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width, height, content=b""):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


def flipped(content, position):
    return content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]


PNG = encoded(Image.fromarray(PIXELS))
JPEG = encoded(Image.fromarray(PIXELS), "JPEG")
EMPTY_JPEG = JPEG.replace(struct.pack(">HH", 24, 20), struct.pack(">HH", 0, 20))
BAD = {
    "truncated.jpg": (JPEG[:-20], "image file is truncated"),
    "truncated.png": (PNG[: len(PNG) // 2], "Truncated"),
    "empty.jpg": (b"", "no image in a known format"),
    "text.png": (b"404: not found", "no image in a known format"),
    "bomb.png": (png(20000, 20000), "400000000 pixels"),
    "small bomb.png": (png(10000, 9000), "10000x9000 pixels, more than 89478485"),
    "checksum.png": (flipped(PNG, PNG.index(b"IEND") - 5), "broken PNG file"),
    "header.png": (flipped(PNG, 29), "no image in a known format"),
    "zero.png": (png(0, 0), "no image in a known format"),
    "zero.jpg": (EMPTY_JPEG, "no image in a known format"),
    "pickle.jpg": (b"cos\nsystem\n(S'true'\ntR.", "no image in a known format"),
    "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "no image in a known format"),
    "float.png": (encoded(Image.fromarray(np.ones((4, 4), "float32")), "TIFF"), "floating-point pixels"),
    "deep.png": (encoded(Image.fromarray(np.full((4, 4), 70000, "int32")), "TIFF"), "32-bit grey with values"),
}


def refused(source, reason):
    with pytest.raises(BadImageError, match=reason) as caught:
        source.read(0)
    assert str(copy.copy(caught.value)) == str(caught.value)  # it may come from a worker process


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD)
def test_unreadable_images_are_refused_with_a_reason(tmp_path, name):
    content, reason = BAD[name]
    (tmp_path / name).write_bytes(b"before" + content)
    refused(TarSource([str(tmp_path / name)], [name], [[0, 6, len(content)]], [0], "RGB"), reason)
    (tmp_path / name).write_bytes(content)
    refused(FolderSource([str(tmp_path / name)], [0], "RGB"), reason)


def test_what_is_no_file_is_refused_even_after_it_was_listed(tmp_path):
    for name, make in (("fifo", os.mkfifo), ("folder", os.mkdir), ("gone", lambda path: None)):
        make(tmp_path / name)
        (tmp_path / f"link to {name}").symlink_to(name)
    (tmp_path / "device").symlink_to("/dev/zero")
    reasons = {
        "fifo": "Not a regular file",
        "device": "Not a regular file",
        "folder": "Is a dir",
        "gone": "No such file",
    }
    for path in tmp_path.iterdir():
        reason = reasons[path.name.removeprefix("link to ")]
        refused(FolderSource([str(path)], [0], "RGB"), reason)
        refused(TarSource([str(path)], ["0.png"], [[0, 0, 9]], [0], "RGB"), reason)


@pytest.mark.parametrize("extension", sorted(EXTENSIONS))
def test_every_extension_that_is_listed_is_decoded(tmp_path, extension):
    path = tmp_path / "red" / f"0{extension.upper()}"
    path.parent.mkdir()
    Image.fromarray(PIXELS).convert("1" if extension == ".pbm" else "RGB").save(path)
    listing = list_folder(tmp_path)
    assert (listing.names, listing.report) == ([str(path)], "")
    image, _ = listing.source(["red"], "RGB").read(0)
    assert (image.mode, image.size) == ("RGB", (20, 24))


def test_what_starts_other_programs_is_no_image():
    assert not EXTENSIONS & {".eps", ".ps", ".pdf", ".wmf", ".emf", ".svg", ".mpg"}


PALETTE = Image.fromarray(np.array([[0, 1, 1]], "uint8"), "P")
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
LEVELS = np.array([[0, 255, 256, 32768, 65535]], "uint16")
ROTATED = Image.Exif()
ROTATED[0x0112] = 6  # a viewer would turn the image by 90 degrees; timm and torchvision do not
GREY = [[[level] * 3 for level in (0, 0, 1, 128, 255)]]
ODD = {
    "cmyk": (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), [[[255, 0, 0]] * 2]),
    "cmyk jpeg": (encoded(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "JPEG", quality=100), [[[255, 0, 0]] * 2]),
    "palette": (encoded(PALETTE, transparency=0), [[[10, 20, 30], [200, 100, 50], [200, 100, 50]]]),
    "palette, alpha": (encoded(PALETTE, transparency=b"\0\x80"), [[[10, 20, 30], [200, 100, 50], [200, 100, 50]]]),
    "16-bit grey": (encoded(Image.fromarray(LEVELS)), GREY),
    "16-bit grey, big-endian": (encoded(Image.fromarray(LEVELS.astype(">u2")), "TIFF"), GREY),
    "32-bit grey": (encoded(Image.fromarray(LEVELS.astype("int32")), "TIFF"), GREY),
    "1x1": (encoded(Image.new("RGB", (1, 1), (1, 2, 3))), [[[1, 2, 3]]]),
    "rotated": (encoded(Image.fromarray(PIXELS), exif=ROTATED), PIXELS),
    "alpha": (encoded(Image.new("RGBA", (1, 1), (9, 8, 7, 0))), [[[9, 8, 7]]]),
    "1-bit": (encoded(Image.fromarray(np.array([[True, False]]))), [[[255] * 3, [0] * 3]]),
    "webp": (encoded(Image.fromarray(PIXELS), "WEBP", lossless=True), PIXELS),
    "gif": (encoded(Image.new("RGB", (1, 1), (1, 2, 3)), "GIF"), [[[1, 2, 3]]]),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ODD)
def test_odd_images_are_decoded_to_their_pixels(tmp_path, kind):
    content, expected = ODD[kind]
    (tmp_path / "0.png").write_bytes(content)  # whatever its name says
    image, target = FolderSource([str(tmp_path / "0.png")], [5], "RGB").read(0)
    assert (image.mode, target) == ("RGB", 5)
    np.testing.assert_array_equal(np.asarray(image), expected)
    grey, _ = FolderSource([str(tmp_path / "0.png")], [5], "L").read(0)
    assert grey.mode == "L"
    np.testing.assert_allclose(np.asarray(grey), np.dot(expected, [0.299, 0.587, 0.114]), atol=1)
