"""From a picture file to 8-bit RGB; what can't be decoded is named."""

import io
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from ecl_hf.data.config import MAX_PIXELS
from ecl_hf.files import read_bytes
from ecl_hf.names import printable

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What counts as a picture, whatever its file is called. Pillow knows more, and for one of them starts Ghostscript."""

MAX_FILE = 1 << 30
"""Bytes of a picture file."""

MAX_RATIO = 100
"""How often the shorter side may go into the longer one: views enlarge the shorter side to that of the input."""

DECODED_LIMIT = 1 << 30
"""Bytes of decoded pixels that a training process keeps; the pictures of a larger set are decoded as they come."""


class BrokenPictureError(ValueError):
    """A picture can't be decoded: one line with its split, row and file, and the reason."""

    def __init__(self, message: str) -> None:
        # A DataLoader makes the error of its worker anew, from a traceback whose last line is the message.
        super().__init__(message.strip().rpartition("\n")[2].removeprefix(f"{__name__}.{type(self).__qualname__}: "))


def content(record: dict[str, Any] | None) -> bytes:
    """A picture's file as it is stored; an OSError or ValueError says why it can't be read."""
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError("no picture in this row")
    return record["bytes"] if record["bytes"] is not None else read_bytes(record["path"], MAX_FILE)


def lies_outside(record: dict[str, Any] | None, folders: Sequence[Path]) -> bool:
    """Whether a picture is a file that does not lie in a data set's folders, or is a link to such a file.

    A stranger's table or link may name any file of this machine: it is none to be published.
    """
    path = record["path"] if record and record["bytes"] is None else None
    if path is None:
        return False
    try:
        real = Path(os.path.realpath(path))
    except ValueError:  # no path at all
        return True
    return not any(real.is_relative_to(folder.resolve()) for folder in folders)


def decode(record: dict[str, Any] | None, where: str = "picture", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A whole picture as 8-bit RGB, turned as its EXIF orientation says; of several frames the first.

    Args:
        record: `bytes` or, where they are None, `path`, as `datasets.Image(decode=False)` gives them.
        where: split and row for the message.
        max_pixels: that it may have.

    Raises:
        BrokenPictureError: the file is missing, empty, damaged, too large, no regular file, or no picture.
    """
    try:
        return _decode(record, max_pixels)
    except ValueError as error:
        parts = Path((record or {}).get("path") or "").parts[-2:]  # where the data set lies is this machine's affair
        named = ", ".join([where, *(["/".join(map(printable, parts))] if parts else [])])
        raise BrokenPictureError(f"{named}: {error}") from None


def defect(record: dict[str, Any] | None, max_pixels: int = MAX_PIXELS) -> str | None:
    """Why a picture can't be decoded; None if it can."""
    try:
        _decode(record, max_pixels)
    except ValueError as error:
        return str(error)
    return None


def _decode(record: dict[str, Any] | None, max_pixels: int) -> Image.Image:
    try:
        file = content(record)
        if not file:
            raise ValueError("empty file")
        with _opened(file) as image:
            check_size(image, max_pixels)
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError("no picture, or of an unknown format") from None
    except FileNotFoundError:
        raise ValueError("the file is not there") from None
    except Exception as error:  # decoders raise what they like
        said = str((isinstance(error, OSError) and error.strerror) or error)
        said = said.removeprefix(f"{(record or {}).get('path')} ")
        raise ValueError(" ".join(said.split()) or type(error).__name__) from None


def check_size(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture that would fill the memory, here or when it is enlarged; ValueError says why."""
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels are more than data.max_pixels, {max_pixels}")
    if max(image.size) > MAX_RATIO * min(image.size):
        raise ValueError(f"{image.width} x {image.height}: a side is more than {MAX_RATIO} times the other")


@contextmanager
def _opened(file: bytes) -> Iterator[Image.Image]:
    """A picture of which nothing but the size is decoded yet; Pillow's warnings, about sizes and odd metadata, go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(file), formats=FORMATS) as image:
            yield image


def decoded_size(record: dict[str, Any] | None) -> int:
    """Bytes of a picture when it is decoded, by the first bytes of its file; 0 if they can't be read."""
    try:
        with _opened(content(record)) as image:
            return 3 * image.width * image.height
    except Exception:  # decoders raise what they like
        return 0


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB.

    16-bit greys (modes `I;16` and `I`) keep their upper eight bits, where PIL would cut everything above 255. Floats
    count as 0..1 if none is larger, else as 0..255. What is transparent shows white, and not the colour stored there,
    which nobody sees; `transformers` itself drops the transparency, so a pipeline should be given such pictures
    through here.
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise ValueError("values that are not finite")
        image = Image.fromarray(np.clip(values * (255 if values.max() <= 1 else 1) + 0.5, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class KeptPictures:
    """Decoded pictures in one piece of memory, which the loading processes of a machine share.

    Args:
        pictures: the first ones of a data set; those beyond `DECODED_LIMIT` are not kept. None is a broken one.
    """

    def __init__(self, pictures: Iterable[Image.Image | None] = ()) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.starts: list[int] = []
        pixels = bytearray()
        for image in pictures:
            width, height = (0, 0) if image is None else image.size
            if len(pixels) + 3 * width * height > DECODED_LIMIT:
                break
            self.sizes.append((width, height))
            self.starts.append(len(pixels))
            pixels += b"" if image is None else image.tobytes()
        # A tensor reaches loading processes without a copy, also those that are not forked.
        self.pixels = torch.frombuffer(pixels or bytearray(1), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, row: int) -> Image.Image | None:
        width, height = self.sizes[row]
        if not width:
            return None
        start = self.starts[row]
        pixels = self.pixels[start : start + 3 * width * height].numpy()
        return Image.frombuffer("RGB", (width, height), pixels, "raw", "RGB", 0, 1)
