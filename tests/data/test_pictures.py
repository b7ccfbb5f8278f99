"""Every kind of picture file comes out as 8-bit RGB, or is named."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin
from transformers.image_utils import load_image

from ecl_hf.data import pictures
from ecl_hf.data.pictures import BrokenPictureError, KeptPictures, decode, decoded_size, defect, to_rgb


def stored(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": None}


def noise(*shape):
    return np.random.RandomState(0).randint(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(
    ("image", "kind"),
    [
        (Image.fromarray(noise(9, 7, 3)), "png"),
        (Image.fromarray(noise(9, 7, 3)), "jpeg"),
        (Image.fromarray(noise(9, 7, 3)), "webp"),
        (Image.fromarray(noise(9, 7)), "png"),
        (Image.fromarray(noise(9, 7)).convert("1"), "png"),
        (Image.fromarray(noise(9, 7, 4), "CMYK"), "jpeg"),
        (Image.fromarray(noise(9, 7, 3)).quantize(12), "png"),
        (Image.fromarray(noise(9, 7, 3)).quantize(12), "gif"),
    ],
    ids=["rgb", "jpeg", "webp", "grey", "bit", "cmyk", "palette", "gif"],
)
def test_opaque_pictures_are_those_of_the_pipeline(image, kind, tmp_path):
    record = stored(image, kind)
    (tmp_path / "picture").write_bytes(record["bytes"])
    ours = decode(record)
    assert ours.mode == "RGB"
    with Image.open(tmp_path / "picture") as opened:
        assert ours.tobytes() == load_image(opened).tobytes()
    assert ours.tobytes() == decode({"bytes": None, "path": str(tmp_path / "picture")}).tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_photos_are_upright_as_in_the_pipeline(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    record = stored(Image.fromarray(noise(8, 16, 3)), "jpeg", exif=exif)
    (tmp_path / "photo.jpg").write_bytes(record["bytes"])
    assert decode(record).size == ((16, 8) if orientation < 5 else (8, 16))
    assert decode(record).tobytes() == load_image(str(tmp_path / "photo.jpg")).tobytes()


def on_white(colour, alpha):
    return [round(c * alpha / 255 + 255 * (1 - alpha / 255)) for c in colour]


@pytest.mark.parametrize("alpha", [0, 51, 200, 255])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_shows_white(mode, alpha):
    colour = (10, 90, 250) if mode == "RGBA" else (90,)
    found = decode(stored(Image.new(mode, (3, 2), (*colour, alpha)))).getpixel((1, 1))
    assert found == pytest.approx(on_white(colour * (3 // len(colour)), alpha), abs=1)


def test_transparent_colour_of_a_palette_and_of_plain_pictures():
    palette = Image.fromarray(np.array([[0, 1]], np.uint8)).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    for transparency in (0, bytes([0, 255])):
        found = decode(stored(palette, transparency=transparency))
        assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (40, 50, 60)]
    plain = Image.fromarray(np.array([[[1, 2, 3], [9, 8, 7]]], np.uint8))
    found = decode(stored(plain, transparency=(1, 2, 3)))
    assert [found.getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (9, 8, 7)]


def test_sixteen_bits_keep_their_shades():
    values = np.array([[0, 255, 256, 20000, 65535]], np.uint16)
    for record in (stored(Image.fromarray(values)), stored(Image.fromarray(values), "tiff")):
        assert np.asarray(decode(record))[0].tolist() == [[v >> 8] * 3 for v in values[0].tolist()]
    whole = Image.fromarray(np.append(values.astype(np.int32), np.array([[-5, 10**6]], np.int32), axis=1))
    assert whole.mode == "I"
    assert np.asarray(to_rgb(whole))[0, :, 0].tolist() == [0, 0, 1, 78, 255, 0, 255]
    assert decode(stored(whole, "tiff")).tobytes() == to_rgb(whole).tobytes()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_pictures_of_many_bits_are_bounded_before_they_are_decoded(kind, monkeypatch):
    record = stored(Image.fromarray(np.zeros((8, 9), kind)), "tiff")
    assert decode(record, max_pixels=72).size == (9, 8)
    monkeypatch.setattr(TiffImagePlugin.TiffImageFile, "load", lambda _: pytest.fail("decoded"))
    with pytest.raises(BrokenPictureError, match="9 x 8 pixels are more than"):
        decode(record, max_pixels=71)


def test_floats_count_from_0_to_1_or_to_255():
    for values in ([0.0, 0.25, 1.0], [0.0, 63.75, 255.0]):
        record = stored(Image.fromarray(np.array([values], np.float32)), "tiff")
        assert np.asarray(decode(record))[0, :, 1].tolist() == [0, 64, 255]
    assert "finite" in defect(stored(Image.fromarray(np.array([[np.nan]], np.float32)), "tiff"))


def broken_files():
    whole = stored(Image.fromarray(noise(200, 200, 3)), "jpeg")["bytes"]
    png = stored(Image.fromarray(noise(20, 20, 3)))["bytes"]
    yield "empty file", b""
    yield "no picture, or of an unknown format", b"not a picture"
    yield "truncated", whole[: len(whole) // 2]
    yield "truncated", png[: len(png) // 2]
    yield "broken", png[:60] + bytes([png[60] ^ 255]) + png[61:]


@pytest.mark.parametrize(("reason", "content"), list(broken_files()))
def test_broken_file_is_named_in_one_line(reason, content, tmp_path):
    file = tmp_path / "cat.jpg"
    file.write_bytes(content)
    for record in ({"bytes": content, "path": "cat.jpg"}, {"bytes": None, "path": str(file)}):
        with pytest.raises(BrokenPictureError, match=rf"^train row 17, .*cat\.jpg: .*{reason}") as error:
            decode(record, "train row 17")
        assert "\n" not in str(error.value)
        assert reason in defect(record)
    with pytest.raises(ValueError, match=f"^train row 3: .*{reason}"):
        decode({"bytes": content, "path": None}, "train row 3")
    assert defect(stored(Image.new("L", (2, 2)))) is None


def test_vanished_file_and_folder_are_named(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(BrokenPictureError, match=r"^test row 0, .*gone\.png: the file is not there$"):
        decode({"bytes": None, "path": str(tmp_path / "gone.png")}, "test row 0")
    with pytest.raises(BrokenPictureError, match=r"folder\.png: "):
        decode({"bytes": None, "path": str(tmp_path / "folder.png")}, "test row 0")


def test_size_is_told_without_the_pixels():
    photo = stored(Image.fromarray(noise(200, 100)), "jpeg")
    assert decoded_size(photo) == len(decode(photo).tobytes()) == 60000
    assert decoded_size({"bytes": photo["bytes"][:500], "path": None}) == 60000
    assert decoded_size({"bytes": b"", "path": None}) == 0


def test_kept_pictures_are_the_same_and_bounded(monkeypatch):
    images = [Image.fromarray(noise(5 + i, 3, 3)) for i in range(4)]
    given = [images[0], None, *images[1:]]
    for kept in (KeptPictures(given), pickle.loads(pickle.dumps(KeptPictures(given)))):
        assert len(kept) == 5
        assert kept[1] is None
        assert [kept[i].tobytes() for i in (0, 2, 3, 4)] == [image.tobytes() for image in images]
        assert [kept[i].size for i in (0, 2, 3, 4)] == [image.size for image in images]
    monkeypatch.setattr(pictures, "DECODED_LIMIT", 9 * (5 + 6))
    kept = KeptPictures(iter(given))
    assert len(kept) == 3
    assert len(kept.pixels) == 99
    assert len(KeptPictures()) == 0
