"""Reading files: pictures as 8-bit RGB, labels as exactly the ids that their writer stored.

Metadata (text, colour profiles, EXIF) never decides whether pixels are read. A file whose pixels cannot give a picture
or exact ids is refused by name.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from utils.config import UserError, reason

try:  # optional: a GTA5 image takes 30 ms in place of Pillow's 110
    from kornia_rs.io import decode_image_png_u8 as decode_png
except ImportError:
    decode_png = None

# Of a folder's or a glob's files, those that are images.
_ENDINGS = "bmp jfif jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp"
IMAGE_ENDINGS = {f".{ending}" for ending in _ENDINGS.split()}
# Formats that are decoded in this process; of others, Pillow hands some to programs (EPS to Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "PPM", "TIFF", "WEBP")
_EXACT_FORMATS = ("PNG", "BMP", "PPM", "TIFF")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp", "tiff_thunderscan", "tiff_sgilog", "tiff_sgilog24")
_PNG_START = b"\x89PNG\r\n\x1a\n"
_COLOUR, _GREY_ALPHA, _COLOUR_ALPHA = 2, 4, 6  # PNG's colour types
# x, y, steps of x and y of the pixels in each pass of an interlaced PNG
_ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
_BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR = 258, 262, 277, 284  # TIFF's tags
_TURN = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Errors that say nothing about the file: the loader explains them.
_OF_THE_SYSTEM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class _Png:
    """A PNG file without its metadata; ValueError if it is cut off, or a chunk that is not metadata fails its checksum.

    Pillow looks at neither, and would decode most such files: to other pixels, in silence.
    """

    def __init__(self, content: bytes):
        if len(content) < 33:
            raise ValueError("the file is cut off")
        width, height, depth, colour, _, _, self.interlaced = struct.unpack_from(">IIBBBBB", content, 16)
        self.size, self.turned = (width, height), False
        self.bits = depth * {_COLOUR: 3, _GREY_ALPHA: 2, _COLOUR_ALPHA: 4}.get(colour, 1)  # of a pixel
        # RGB or RGBA where colours have 16 bits, of which Pillow keeps the upper 8.
        self.deep = {_COLOUR: "RGB", _COLOUR_ALPHA: "RGBA"}.get(colour, "") if depth == 16 else ""
        view, place, kind = memoryview(content), 8, b""
        self._chunks, self._pixels = [view[:8]], []  # what is copied is most of the time that this takes
        while kind != b"IEND":
            length, kind = struct.unpack(">I4s", content[place : place + 8].ljust(8))
            chunk = view[place : place + 12 + length]
            place += 12 + length
            if place > len(content):
                raise ValueError("the file is cut off")
            exif, critical = kind == b"eXIf" and _sound(chunk), kind[:1].isupper()  # the others are ancillary
            if critical and not _sound(chunk):
                raise ValueError(f"the file is damaged: its chunk {kind!r} fails its checksum")
            self.turned |= exif
            if exif or critical:
                self._chunks.append(chunk)
            if kind == b"IDAT":
                self._pixels.append(chunk[8 : 8 + length])
        self.plain = (depth, colour, self.interlaced, self.turned) == (8, _COLOUR, 0, False)

    def content(self) -> bytes:
        """The file."""
        return b"".join(self._chunks)

    def refuse_short(self) -> None:
        """ValueError if there are fewer pixels than the header says: decoders leave the others at zero."""
        width, height = self.size
        passes = _ADAM7 if self.interlaced else [(0, 0, 1, 1)]
        sides = [(math.ceil((width - x) / dx), math.ceil((height - y) / dy)) for x, y, dx, dy in passes]
        needed = sum(h * (1 + math.ceil(w * self.bits / 8)) for w, h in sides if w > 0 and h > 0)
        if len(zlib.decompressobj().decompress(b"".join(self._pixels), needed)) < needed:
            raise ValueError("the file is cut off: pixels are missing")

    def decode(self, layout: str, rows: int | None = None) -> Image.Image:
        """The picture, or its uppermost rows; `layout` is Pillow's name for how pixels are stored."""
        size = (self.size[0], rows or self.size[1])
        return Image.frombytes(layout.partition(";")[0], size, b"".join(self._pixels), "zip", layout, self.interlaced)


def _sound(chunk: memoryview) -> bool:
    """Whether a PNG's chunk has its checksum."""
    return zlib.crc32(chunk[4:-4]).to_bytes(4) == chunk[-4:]


def _read(path: Path) -> tuple[bytes, _Png | None]:
    content = path.read_bytes()
    return content, _Png(content) if content.startswith(_PNG_START) else None


def _open(content: bytes, png: _Png | None) -> Image.Image:
    """A picture that is not decoded yet."""
    try:
        picture = Image.open(io.BytesIO(png.content() if png else content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture of a known format ({', '.join(_FORMATS)})") from None
    if picture.format == "BMP" and picture.mode == "1" and content[28] == 8:  # which Pillow decodes as one bit each
        raise ValueError("a BMP of 8 bits whose palette is black and white alone: save it as PNG")
    picture.info.pop("xmp", None)  # where Pillow looks for an orientation if EXIF has none
    return picture


def _layout(picture: Image.Image) -> tuple[str, int | None]:
    """How the file stores pixels, by Pillow's name, and the largest value that it declares, if it does."""
    if not picture.tile:  # WebP: no other format hides it
        return picture.mode, None
    decoder, _, _, options = picture.tile[0]
    options = (options,) if isinstance(options, str) else options
    return options[0], options[1] if decoder.startswith("ppm") and len(options) > 1 else None


def stored_as(path: Path) -> tuple[str, dict[int, tuple[int, ...]]]:
    """How a file stores its pixels, in Pillow's words, e.g. L;2 for grey of two bits; UserError as for the readers.

    With it {index: (r, g, b)} of what a picture with a colour palette uses; {} of others.
    """
    with _named("file", path):
        picture = _open(*_read(path))
        layout, _ = _layout(picture)
        if picture.mode != "P":
            return layout, {}
        used, flat = np.flatnonzero(picture.histogram()), picture.getpalette("RGB")
        colours = [*zip(flat[::3], flat[1::3], flat[2::3])]
        grey = all(r == g == b for r, g, b in colours)
        return layout, {} if grey else {int(i): colours[i] for i in used if i < len(colours)}


@contextlib.contextmanager
def _named(kind: str, path: Path) -> Iterator[None]:
    """Turn what fails inside into a UserError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata and sizes
            yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in every way there is
        if isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM:
            raise
        raise UserError(f"cannot read {kind} {show_name(path)}: {reason(error)}") from None


def show_name(name: object) -> str:
    """A path, or text with paths, for one line: control characters and bytes that are no UTF-8 become \\xNN."""
    text = str(name).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", text)


def read_picture(path: Path) -> Image.Image:
    """8-bit RGB picture, upright as its EXIF entry says, without alpha.

    Raises:
        UserError: the file cannot be decoded, or its numbers have no meaning in 8 bits.
    """
    return read_upper_rows(path, lambda size: 1)[0]


def read_upper_rows(path: Path, share: Callable[[tuple[int, int]], float]) -> tuple[Image.Image, tuple[int, int]]:
    """As `read_picture`, but rows further down than needed may be missing: decoding is most of a sample's time.

    Args:
        share: gives, for the picture's (width, height), the share of the height, from the top, that is needed.

    Returns:
        The rows, and the whole picture's (width, height).
    """
    with _named("image", path):
        content, png = _read(path)
        if png and png.plain and math.prod(png.size) <= 2 * Image.MAX_IMAGE_PIXELS:  # Pillow refuses more
            width, height = png.size
            if decode_png:
                with contextlib.suppress(Exception):  # it has no others; Pillow then says what is wrong, or reads it
                    return _whole(Image.fromarray(decode_png(content, (height, width), "rgb")), png), png.size
            rows = math.ceil(height * share(png.size)) + 1  # one more, where a filter magnifies
            if rows < height:
                return _whole(png.decode("RGB", rows), png), png.size
        picture = _open(content, png)
        if picture.format in ("TIFF", "WEBP") and _pages_of_one_size(picture):
            raise ValueError("it has several pages: save each as an image of its own")
        layout, declared = _layout(picture)
        if declared == 65535 and picture.mode == "RGB" and 0 < _largest(picture, content, declared) < 256:
            raise ValueError("colours of 16 bits that hold no value above 255: save 8 bits")
        picture.load()
        upright = _eight_bits(_whole(picture, png), layout, png)
        turn = _turn_of(picture)  # Pillow's own call rewrites all EXIF
        upright = upright if turn is None else upright.transpose(turn)
        return upright if upright.mode == "RGB" else upright.convert("RGB"), upright.size


def _whole(picture: Image.Image, png: _Png | None) -> Image.Image:
    """The picture; ValueError if the file ends before its last pixel, which is black then."""
    if png and (png.interlaced or not np.any(picture.getpixel((picture.width - 1, picture.height - 1)))):
        png.refuse_short()
    return picture


def _largest(picture: Image.Image, content: bytes, declared: int) -> int:
    """The largest number in a PGM or PPM; `declared` if it is stored as text, which Pillow holds to that."""
    decoder, _, offset, _ = picture.tile[0]
    if decoder != "ppm":
        return declared
    kind = np.dtype(">u2" if declared > 255 else "u1")
    numbers = min(math.prod(picture.size) * len(picture.getbands()), (len(content) - offset) // kind.itemsize)
    return int(np.frombuffer(content, kind, numbers, offset).max(initial=0))


def is_turned(path: Path) -> bool:
    """Whether EXIF turns a picture upright; UserError as of `read_picture`."""
    with _named("image", path):
        return _turn_of(_open(*_read(path))) is not None


def _turn_of(picture: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright by its EXIF orientation, if that can be read."""
    try:
        return _TURN.get(picture.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of many kinds
        return None


def _eight_bits(picture: Image.Image, layout: str, png: _Png | None) -> Image.Image:
    """A picture of more bits in 8. A deep file that holds no value above 255 holds 8-bit values."""
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        raise ValueError("floating-point pixels")
    raw = picture.info.get("compression") == "raw"
    if raw and tags.get(_PLANAR) == 2 and tags.get(_SAMPLES, 1) > 1 and max(tags.get(_BITS, (8,))) > 8:
        raise ValueError("colours of 16 bits in separate planes: save 8 bits, or interleaved colours")
    if picture.mode.startswith("I"):
        if tags.get(_PHOTOMETRIC) == 0:  # white is zero
            raise ValueError("grey of more than 8 bits that is stored inverted")
        values = np.asarray(picture)
        least, most = int(values.min()), int(values.max())
        sixteen = picture.mode.startswith("I;16") or picture.format in ("PNG", "PPM")
        if least < 0 or (most > 255 and not sixteen):
            raise ValueError(f"numbers of {least} to {most}, of which none is known to be white: save 8 or 16 bits")
        bits = 12 if layout == "I;12" else 16
        return Image.fromarray((values >> bits - 8 if most > 255 else values).astype(np.uint8))
    if layout.endswith((";16B", ";16L", ";16N")) and not np.asarray(picture.convert("RGB")).any():
        if not (png and png.deep):
            raise ValueError("colours of 16 bits that hold no value above 255: save 8 bits")
        return png.decode(f"{png.deep};16L")  # read as little-endian: the lower 8 bits
    return picture


def read_image(path: Path) -> Tensor:
    """`read_picture` as uint8 (3, H, W)."""
    return F.pil_to_tensor(read_picture(path))


def read_label_ids(path: Path) -> np.ndarray:
    """Label ids (H, W), uint8 or uint16, exactly as their writer stored them.

    Grey of 1 to 32 bits gives its number. A palette picture gives its index, unless the palette is grey: then an
    optimiser has moved the id into the grey. Of colour with 16 bits, as SYNTHIA has it, the first channel counts.

    Raises:
        UserError: the file cannot be decoded, does not keep exact numbers, holds others than 0..65535, is a colour
            picture of 8 bits, or has a grey palette that leaves open whether index or grey is the id.
    """
    with _named("label", path):
        content, png = _read(path)
        picture = _open(content, png)
        if picture.format not in _EXACT_FORMATS or picture.info.get("compression") in _LOSSY_TIFF:
            raise ValueError(f"{picture.format} compression does not keep ids exactly: save it as PNG")
        if picture.format == "TIFF":
            if _pages_of_one_size(picture):
                raise ValueError("it has several pages: save one as PNG")
            if picture.mode == "L" and picture.tag_v2.get(_SAMPLES, 1) > 1:
                raise ValueError("it has several channels: save the one with the ids as PNG")
            if picture.mode.startswith("I") and picture.tag_v2.get(_PHOTOMETRIC) == 0:  # which Pillow ignores there
                raise ValueError("its greys are stored inverted: save it as PNG")
        layout, declared = _layout(picture)
        if declared and (most := _largest(picture, content, declared)) > declared:  # Pillow would make it the largest
            raise ValueError(f"it holds {most}, but its header says that {declared} is the largest")
        if (not png or png.turned) and _turn_of(picture) is not None:
            raise ValueError("its EXIF entry turns it, which readers of labels take or leave: save it upright")
        if png and png.deep:
            upper, lower = (png.decode(f"{png.deep};16{order}") for order in "BL")
            high, low = (np.asarray(part.getchannel(0)) for part in (upper, _whole(lower, png)))
            return high.astype(np.uint16) << 8 | low
        if picture.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
            depth = "a 16-bit" if ";16" in layout else "an 8-bit"
            kind = "a floating-point" if picture.mode == "F" else depth
            raise UserError(
                f"label {show_name(path)} is {kind} picture of mode {picture.mode}; a grey, palette or 16-bit PNG of "
                "label ids is needed"
            )
        mode, _, option = layout.partition(";")
        if mode in ("1", "L") and "I" in option:
            raise ValueError("its greys are stored inverted: save it as PNG")
        if picture.format == "BMP" and picture.mode != "P" and content[28] != 8:
            raise ValueError("a grey BMP of few bits: save it as PNG")
        ids = np.asarray(_whole(picture, png))
        if mode == "P":
            return _ids_of_palette(ids, picture)
        if picture.mode == "1":
            return ids.astype(np.uint8)
        if picture.mode == "I":
            if ids.min() < 0 or ids.max() >= 2**16:
                raise ValueError(f"it holds {ids.min()} to {ids.max()}; label ids are 0 to 65535")
            ids = ids.astype(np.uint16)
        # Pillow stretches what is below 8 or 16 bits to their whole range.
        full = 65535 if picture.mode == "I" else 255
        most = declared or {"2": 3, "4": 15}.get(option[:1] if picture.mode == "L" else "", full)
        return ids if most == full or picture.mode.startswith("I;") else np.rint(ids * (most / full)).astype(ids.dtype)


def _pages_of_one_size(picture: Image.Image) -> bool:
    """Whether a TIFF or WebP has a second page as large as the first; a smaller one is a preview."""
    size, several = picture.size, picture.n_frames > 1
    if several:
        picture.seek(1)
        several = picture.size == size
        picture.seek(0)
    return several


def _ids_of_palette(index: np.ndarray, picture: Image.Image) -> np.ndarray:
    """The ids of a palette picture: its indices, or its greys."""
    colours = np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3)
    greys, used = colours[:, 0], np.flatnonzero(picture.histogram())
    if (colours != greys[:, None]).any():
        return index
    if used[-1] < len(greys):
        if (greys[used] == used).all():
            return index
        shown = greys[: used[-1] + 1].astype(int)  # a ramp from black to white, or upwards in equal steps, is for eyes
        ramp = np.rint(np.linspace(shown[0], shown[-1], len(shown)))
        even = len(shown) > 2 and abs(shown - ramp).max() <= 1 and abs(shown[-1] - shown[0]) >= 2 * (len(shown) - 1)
        if not (even and 0 in shown) and sorted(shown) != [0, 255] and len(set(greys[used])) == len(used):
            return greys[index]
    raise ValueError(
        "its palette is grey, so that ids may be its indices or its greys: save it as grey or with a colour palette"
    )


def save_picture(path: Path, picture: Image.Image, **options: object) -> None:
    """Write a picture, with Pillow's options, into its folder, which is made; UserError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, **options)
    except OSError as error:  # a full disk, a read-only folder, a side above 65,500 pixels, which JPEG cannot hold
        raise UserError(f"cannot write {path}: {reason(error)}") from None
