"""Labels are read as exactly the ids that were stored, pictures as what they show; all else is refused by name."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data import images
from data.images import read_image, read_label_ids, read_picture, show_name
from data.toy import png16
from utils.config import UserError

RNG = np.random.default_rng(0)


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(values, bits, colour, palette=None):
    """A PNG of grey (colour 0) or palette (3) values (H, W), of any number of bits."""
    rows = np.unpackbits(values.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(len(values), -1)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=1))
    header = struct.pack(">IIBBBBB", *values.shape[::-1], bits, colour, 0, 0, 0)
    plte = chunk(b"PLTE", bytes(palette)) if palette is not None else b""
    body = chunk(b"IHDR", header) + plte + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def some(number, dtype=np.uint8):
    return RNG.integers(0, number, (9, 13)).astype(dtype)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_and_colour_palettes_of_few_bits_hold_their_numbers(tmp_path, bits):
    ids = some(2**bits)
    (tmp_path / "grey.png").write_bytes(png(ids, bits, 0))
    (tmp_path / "palette.png").write_bytes(png(ids, bits, 3, RNG.integers(0, 256, 3 * 2**bits).tolist()))
    for name in ("grey.png", "palette.png"):
        np.testing.assert_array_equal(read_label_ids(tmp_path / name), ids)


@pytest.mark.parametrize("greys", [[1, 0, 2], [7, 26], [5], [3, 1, 255, 0], [0, 1, 2, 3], [0, 7, 8, 11]])
def test_grey_palette_of_an_optimiser_is_undone(tmp_path, greys):
    index = some(len(greys))
    (tmp_path / "x.png").write_bytes(png(index, 2, 3, np.repeat(greys, 3).tolist()))
    np.testing.assert_array_equal(read_label_ids(tmp_path / "x.png"), np.array(greys)[index])


@pytest.mark.parametrize("greys", [[0, 255], [255, 0], [0, 128, 255], [0, 10, 20, 30], [0, 0, 0]])
def test_grey_palette_for_the_eye_is_refused(tmp_path, greys):
    (tmp_path / "x.png").write_bytes(png(some(len(greys)), 2, 3, np.repeat(greys, 3).tolist()))
    with pytest.raises(UserError, match=r"cannot read label .*x\.png: its palette is grey"):
        read_label_ids(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["png", "tif", "bmp", "pgm"])
@pytest.mark.parametrize(("number", "dtype"), [(256, np.uint8), (60000, np.uint16), (60000, np.int32)])
def test_labels_of_8_16_and_32_bits(tmp_path, ending, number, dtype):
    if (ending in ("bmp", "pgm") and number > 256) or (ending == "png" and dtype == np.int32):
        pytest.skip("Pillow does not write it")
    ids = some(number, dtype)
    Image.fromarray(ids).save(tmp_path / f"x.{ending}")
    np.testing.assert_array_equal(read_label_ids(tmp_path / f"x.{ending}"), ids)


@pytest.mark.parametrize("most", [18, 255, 1000, 65535])
def test_pgm_of_any_range(tmp_path, most):
    ids = some(most + 1, np.uint16)
    body = ids.astype(np.uint8 if most < 256 else ">u2").tobytes()
    (tmp_path / "binary.pgm").write_bytes(b"P5\n13 9\n%d\n" % most + body)
    (tmp_path / "plain.pgm").write_bytes(b"P2\n13 9\n%d\n" % most + " ".join(map(str, ids.ravel())).encode())
    for name in ("binary.pgm", "plain.pgm"):
        np.testing.assert_array_equal(read_label_ids(tmp_path / name), ids)


@pytest.mark.parametrize("most", [26, 1000])
def test_pgm_beyond_its_own_range_is_refused(tmp_path, most):
    ids = np.full((9, 13), most + 1, np.uint8 if most < 256 else ">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5\n13 9\n%d\n" % most + ids.tobytes())
    with pytest.raises(
        UserError, match=rf"x\.pgm: it holds {most + 1}, but its header says that {most} is the largest"
    ):
        read_label_ids(tmp_path / "x.pgm")


@pytest.mark.parametrize("filtered", [0, 1, 2, 3, 4])
def test_first_channel_of_16_bit_colour(tmp_path, filtered):
    """By any of PNG's filters."""
    pixels = RNG.integers(0, 2**16, (9, 13, 3)).astype(np.uint16)
    raw = np.pad(pixels.astype(">u2").view(np.uint8).reshape(9, -1).astype(int), ((1, 0), (6, 0)))
    here, left, up, corner = raw[1:, 6:], raw[1:, :-6], raw[:-1, 6:], raw[:-1, :-6]
    far = [abs(left + up - corner - x) for x in (left, up, corner)]
    paeth = np.where((far[0] <= far[1]) & (far[0] <= far[2]), left, np.where(far[1] <= far[2], up, corner))
    lines = (here - [0 * here, left, up, (left + up) // 2, paeth][filtered]).astype(np.uint8)
    lines = np.pad(lines, ((0, 0), (1, 0)), constant_values=filtered)
    header = struct.pack(">IIBBBBB", 13, 9, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines.tobytes())) + chunk(b"IEND", b"")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    np.testing.assert_array_equal(read_label_ids(tmp_path / "x.png"), pixels[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), (pixels >> 8).transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("name", "array", "options", "why"),
    [
        ("x.jpg", some(19), {}, "JPEG compression does not keep ids exactly"),
        ("x.webp", np.dstack([some(19)] * 3), {"lossless": True}, "WEBP compression does not keep"),
        ("x.tif", some(19), {"compression": "jpeg"}, "TIFF compression does not keep"),
        ("x.tif", some(19), {"tiffinfo": {262: 0}}, "stored inverted"),
        ("x.pbm", some(2).astype(bool), {}, "stored inverted"),
        ("x.tif", some(19, np.int32) - 1, {}, "it holds -1 to"),
        ("x.tif", some(19, np.int32) + 2**16, {}, "label ids are 0 to 65535"),
        ("x.tif", some(19, np.float32), {}, "a floating-point picture of mode F"),
        ("x.png", np.dstack([some(19)] * 3), {}, "8-bit picture of mode RGB"),
        ("x.png", np.dstack([some(19)] * 2), {}, "8-bit picture of mode LA"),
    ],
)
def test_labels_that_cannot_be_exact_are_refused(tmp_path, name, array, options, why):
    Image.fromarray(array).save(tmp_path / name, **options)
    with pytest.raises(UserError, match=rf"label .*{name}.*{why}"):
        read_label_ids(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_grey_that_holds_8_bits_is_not_black(tmp_path, dtype):
    values = np.array([[0, 100, 200, 255]], dtype)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert read_image(tmp_path / "x.tif").tolist() == [values.tolist()] * 3


def test_deep_colour_that_holds_8_bits_is_not_black(tmp_path):
    pixels = RNG.integers(0, 256, (9, 13, 3)).astype(np.uint16)
    (tmp_path / "x.png").write_bytes(png16(pixels))
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), pixels.transpose(2, 0, 1))


def test_deep_colour_of_a_ppm_that_holds_8_bits_is_refused(tmp_path):
    pixels = RNG.integers(0, 256, (9, 13, 3)).astype(">u2")
    (tmp_path / "x.ppm").write_bytes(b"P6\n13 9\n65535\n" + pixels.tobytes())
    with pytest.raises(UserError, match=r"x\.ppm: colours of 16 bits that hold no value above 255"):
        read_image(tmp_path / "x.ppm")
    for most, values in ((1023, pixels // 64), (65535, pixels * 0)):  # ten bits; a black picture
        (tmp_path / "x.ppm").write_bytes(b"P6\n13 9\n%d\n" % most + values.astype(">u2").tobytes())
        assert (read_image(tmp_path / "x.ppm").numpy().transpose(1, 2, 0) <= values // 4 + 1).all()
    (tmp_path / "x.ppm").write_bytes(b"P6\n13 9\n65535\n" + (pixels * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(read_image(tmp_path / "x.ppm"), pixels.transpose(2, 0, 1))


def test_grey_of_12_bits_keeps_its_upper_8(tmp_path):
    values = np.array([[0, 0x123, 0xABC, 0xFFF]])
    path = tiff(tmp_path / "x.tif", values[None], 1, 1)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack("<HHII", 258, 3, 1, 16)) + 8] = 12
    path.write_bytes(content[:-8] + bytes.fromhex("000123abcfff"))
    assert read_image(path)[0].tolist() == [[0, 0x12, 0xAB, 0xFF]]


def test_32_bit_grey_beyond_8_bits_is_refused(tmp_path):
    Image.fromarray(np.array([[0, 70000]], np.int32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"cannot read image .*x\.tif: numbers of 0 to 70000"):
        read_image(tmp_path / "x.tif")


def odd_exif():
    """Turned by 90 degrees, and a resolution of -1/0."""
    entries = ((0x112, 3, struct.pack("<HH", 6, 0)), (0x11A, 10, struct.pack("<I", 38)))
    body = b"".join(struct.pack("<HHI", tag, kind, 1) + value for tag, kind, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + body + bytes(4) + struct.pack("<ii", -1, 0)


def test_metadata_does_not_decide_whether_pixels_are_read(tmp_path, recwarn):
    picture = Image.fromarray(RNG.integers(0, 256, (9, 13, 3), np.uint8))
    text = PngInfo()
    text.add_text("XML:com.adobe.xmp", "x" * 2_000_000, zip=True)
    picture.save(tmp_path / "text.png", pnginfo=text)
    picture.save(tmp_path / "profile.png", icc_profile=bytes(2_000_000))
    picture.save(tmp_path / "sound.png")
    content = (tmp_path / "sound.png").read_bytes()
    broken = chunk(b"zTXt", b"x\0\0no zlib") + chunk(b"pHYs", b"short") + chunk(b"eXIf", b"none")[:-1] + b"?"
    (tmp_path / "broken.png").write_bytes(content[:33] + broken + content[33:])
    for name in ("text", "profile", "broken"):
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png").permute(1, 2, 0), np.asarray(picture))
    picture.save(tmp_path / "plain.jpg")
    picture.save(tmp_path / "exif.jpg", exif=odd_exif())
    assert torch.equal(read_image(tmp_path / "exif.jpg"), read_image(tmp_path / "plain.jpg").rot90(-1, (1, 2)))
    assert not recwarn


XMP = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.mark.parametrize("ending", ["jpg", "webp", "tif"])
def test_xmp_turns_nothing(tmp_path, ending):
    given = {"tiffinfo": {700: XMP}} if ending == "tif" else {"xmp": XMP}
    Image.new("RGB", (48, 32)).save(tmp_path / f"x.{ending}", **given)
    assert Image.open(tmp_path / f"x.{ending}").getexif()[0x0112] == 6  # Pillow's own reading
    assert read_image(tmp_path / f"x.{ending}").shape == (3, 32, 48)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16] = 255  # the corner tells how it was turned
    Image.fromarray(pixels).save(tmp_path / "x.jpg", exif=exif, quality=100)
    read = read_image(tmp_path / "x.jpg")[0] > 127
    turned = orientation > 4
    assert read.shape == ((48, 32) if turned else (32, 48))
    right, low = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    assert read[-8 if low else 8, -8 if right else 8] and read.sum() == 256


def test_16_bit_png_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # by a quarter to the right
    values = np.arange(6, dtype=np.uint16).reshape(2, 3) * 1000
    Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png")[0], np.rot90(values >> 8, -1))


@pytest.mark.parametrize("read", [read_label_ids, read_image])
def test_a_damaged_png_is_refused(tmp_path, read):
    """Pillow looks at no checksum of pixels: it would read other ids."""
    values = np.kron(some(20), np.ones((4, 4)))
    whole = png(values, 8, 0)
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    header = bytearray(whole)
    header[19] -= 1  # the width
    files = {
        "flipped": flipped,
        "header": header,
        "zeros": whole[:-20] + bytes(20),
        "cut": whole[:-1],
        "short": whole[:18],
    }
    for name, content in files.items():
        (tmp_path / f"{name}.png").write_bytes(content)
        with pytest.raises(UserError, match=rf"{name}\.png: the file is (damaged: its chunk b'I.*' fails|cut off)"):
            read(tmp_path / f"{name}.png")
    (tmp_path / "x.png").write_bytes(whole + b"more")
    read(tmp_path / "x.png")


@pytest.mark.parametrize("library", ["kornia", "Pillow"])
@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("side", [16, 17])
def test_a_png_of_too_few_rows_is_refused(tmp_path, monkeypatch, library, interlaced, side):
    """All checksums hold; decoders leave the missing rows black."""
    if library == "Pillow":
        monkeypatch.setattr(images, "decode_png", None)
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    sides = [(-(-(side - x) // dx), -(-(side - y) // dy)) for x, y, dx, dy in passes] if interlaced else [(side, side)]
    for name, read, colour, channels in (("label", read_label_ids, 0, 1), ("image", read_image, 2, 3)):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, colour, 0, 0, interlaced))
        data = b"".join((b"\0" + b"\x1a" * w * channels) * h for w, h in sides)
        path = tmp_path / f"{name}.png"
        for share in (1, 0.9, 0.5):
            pixels = chunk(b"IDAT", zlib.compress(data[: int(share * len(data))]))
            path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
            if share == 1:
                assert (np.asarray(read(path)) == 26).all()
            else:
                with pytest.raises(
                    UserError, match=rf"{name}\.png: (the file is cut off: pixels are missing|image file is truncated)"
                ):
                    read(path)


def tiff(path, planes, photometric, planar):
    """A TIFF of 16-bit channels (C, H, W), one after another where `planar` is 2, else interleaved."""
    (channels, height, width), strips = planes.shape, len(planes) if planar == 2 else 1
    data = (planes if planar == 2 else planes.transpose(1, 2, 0)).astype("<u2").tobytes()
    after = 8 + 2 + 12 * 10 + 4
    bits, places, counts = after, after + 2 * channels, after + 2 * channels + 4 * strips
    start, each = counts + 4 * strips, len(data) // strips
    tags = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, channels, 16 if channels == 1 else bits), (259, 3, 1, 1)]
    tags += [(262, 3, 1, photometric), (273, 4, strips, start if strips == 1 else places), (277, 3, 1, channels)]
    tags += [(278, 3, 1, height), (279, 4, strips, each if strips == 1 else counts), (284, 3, 1, planar)]
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    lists = np.full(channels, 16, "<u2").tobytes() + (start + each * np.arange(strips)).astype("<u4").tobytes()
    path.write_bytes(header + bytes(4) + lists + np.full(strips, each, "<u4").tobytes() + data)
    return path


def test_16_bit_tiffs_that_pillow_misreads_are_refused(tmp_path):
    colours = np.stack([some(256)] * 3).astype(np.uint16) * 257
    found = read_image(tiff(tmp_path / "x.tif", colours, 2, 1))
    assert (found.numpy() == colours >> 8).all()
    with pytest.raises(UserError, match=r"y\.tif: colours of 16 bits in separate planes"):
        read_image(tiff(tmp_path / "y.tif", colours, 2, 2))
    grey = colours[:1]
    assert (read_label_ids(tiff(tmp_path / "g.tif", grey, 1, 1)) == grey[0]).all()
    with pytest.raises(UserError, match=r"i\.tif: its greys are stored inverted"):
        read_label_ids(tiff(tmp_path / "i.tif", grey, 0, 1))
    Image.new("LA", (13, 9)).save(tmp_path / "t.tif")
    alpha, unspecified = (struct.pack("<HHIHH", 338, 3, 1, meaning, 0) for meaning in (2, 0))
    (tmp_path / "t.tif").write_bytes((tmp_path / "t.tif").read_bytes().replace(alpha, unspecified))
    with pytest.raises(UserError, match=r"t\.tif: it has several channels"):
        read_label_ids(tmp_path / "t.tif")


def test_names_stay_in_one_line():
    assert show_name("a\nb\x7f.png") == r"a\x0ab\x7f.png"


def test_names_that_are_no_utf8(tmp_path):
    path = tmp_path / "stra\udcdfe.png"
    path.write_bytes(b"no picture")
    with pytest.raises(UserError) as error:
        read_image(path)
    assert "stra\\xdfe.png" in str(error.value) and show_name("straße") == "straße"
    str(error.value).encode()


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.bmp", "x.ppm", "x.tif", "x.webp"])
def test_pictures_of_every_format_are_read(tmp_path, name):
    across = np.linspace(0, 255, 48, dtype=np.uint8)
    array = np.stack(np.broadcast_arrays(across, across[:32, None], np.uint8(90)), axis=2)  # smooth: no loss shows
    Image.fromarray(array).save(tmp_path / name)
    image = read_image(tmp_path / name).permute(1, 2, 0).numpy()
    assert image.shape == array.shape
    assert np.abs(image.astype(int) - array).mean() <= (4 if name in ("x.jpg", "x.webp") else 0)  # these are lossy


def test_a_bmp_that_pillow_decodes_wrongly_is_refused(tmp_path):
    picture = Image.fromarray(some(2))
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(tmp_path / "x.bmp")
    content = bytearray((tmp_path / "x.bmp").read_bytes())
    kept, pixels = 54 + 4 * 2, int.from_bytes(content[10:14], "little")  # a palette of two entries
    content[46:50], content[10:14] = (2).to_bytes(4, "little"), kept.to_bytes(4, "little")
    (tmp_path / "x.bmp").write_bytes(content[:kept] + content[pixels:])
    for read, kind in ((read_label_ids, "label"), (read_image, "image")):
        with pytest.raises(UserError, match=rf"cannot read {kind} .*x\.bmp: a BMP of 8 bits"):
            read(tmp_path / "x.bmp")


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_a_label_that_metadata_turns_is_refused(tmp_path, ending):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"x.{ending}"
    Image.fromarray(some(19)).save(path, exif=exif)
    with pytest.raises(UserError, match=r"cannot read label .*x\.\w+: its EXIF entry turns it"):
        read_label_ids(path)


@pytest.mark.parametrize("ending", ["tif", "webp"])
def test_an_image_of_several_pages_is_refused_and_one_with_a_preview_is_read(tmp_path, ending):
    page = Image.fromarray(some(19)).convert("RGB")
    page.save(tmp_path / f"two.{ending}", save_all=True, append_images=[page.transpose(Image.Transpose.ROTATE_180)])
    with pytest.raises(UserError, match=rf"two\.{ending}: it has several pages"):
        read_picture(tmp_path / f"two.{ending}")
    page.save(tmp_path / "preview.tif", save_all=True, append_images=[page.resize((5, 4))])
    np.testing.assert_array_equal(read_picture(tmp_path / "preview.tif"), page)


def test_a_label_of_several_pages_is_refused_and_one_with_a_preview_is_read(tmp_path):
    pages = [some(19) for _ in range(2)]
    first, second = (Image.fromarray(page) for page in pages)
    first.save(tmp_path / "two.tif", save_all=True, append_images=[second])
    with pytest.raises(UserError, match=r"two\.tif: it has several pages"):
        read_label_ids(tmp_path / "two.tif")
    first.save(tmp_path / "preview.tif", save_all=True, append_images=[second.resize((5, 4))])
    np.testing.assert_array_equal(read_label_ids(tmp_path / "preview.tif"), pages[0])


def test_want_of_memory_is_not_the_files_fault(tmp_path, monkeypatch):
    Image.fromarray(some(19)).save(tmp_path / "x.png")

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("data.images._open", full)
    with pytest.raises(MemoryError):
        read_label_ids(tmp_path / "x.png")
