"""Images: golden pixels, odd kinds of files, and files with false claims."""

import hashlib
import importlib.util
import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tove_llava.core.errors import ConfigError, DataError
from tove_llava.data import ImageTransform, open_image, to_rgb
from tove_llava.data.images import CLIP_MEAN, CLIP_STD, resolve_image
from tove_llava.data.resize import TOLERANCE, pad_to_square


def _bytes(pixels):
    """Undo the normalisation: [3, H, W] to 8-bit [H, W, 3]."""
    mean, std = torch.tensor(CLIP_MEAN)[:, None, None], torch.tensor(CLIP_STD)[:, None, None]
    return ((pixels * std + mean) * 255).round().byte().permute(1, 2, 0).numpy()


def _noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_golden_pixels(conformance):
    golden = np.load(conformance / "llava" / "image_preprocess.npz", allow_pickle=False)
    assert len(golden["keys"]) == 12
    for key in map(str, golden["keys"]):
        stem, mode = key.rsplit("__", 1)
        transform = ImageTransform(336, "pad" if mode == "pad" else "square")
        pixels = transform.open(conformance / "llava" / "images" / f"{stem}.png")
        assert pixels.dtype == torch.float32
        assert hashlib.sha256(_bytes(pixels).tobytes()).hexdigest() == str(golden[f"{key}/u8_sha256"]), key
        # The golden slices are float16, whose step just below 4 is 0.002.
        torch.testing.assert_close(
            pixels[:, ::7, ::7], torch.tensor(golden[f"{key}/slice7"]).float(), atol=1e-3, rtol=0
        )
        torch.testing.assert_close(pixels.double().mean((1, 2)), torch.tensor(golden[f"{key}/mean"]), atol=1e-5, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.booleans(), st.integers(0, 99))
def test_pixels_are_the_processors_bit_for_bit(width, height, side, pad, seed):
    image = _noise(width, height, seed)
    mean, std = (CLIP_MEAN, CLIP_STD) if seed % 2 else ((0.5, 0.4, 0.3), (0.2, 0.5, 0.1))
    transform = ImageTransform(side, "pad" if pad else "square", mean=mean, std=std)
    shown = pad_to_square(image, tuple(int(x * 255) for x in mean)) if pad else image
    expected = transform.processor(images=shown, return_tensors="pt")["pixel_values"][0]
    pixels = transform(image)
    assert pixels.dtype == torch.float32 and torch.equal(pixels, expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 120), st.booleans(), st.integers(0, 99))
def test_torchs_resize_is_within_its_tolerance(width, height, side, pad, seed):
    """Noise is harder on it than photographs."""
    image, how = _noise(width, height, seed), "pad" if pad else "square"
    exact = _bytes(ImageTransform(side, how)(image)).astype(int)
    fast = _bytes(ImageTransform(side, how, image_resize="torch")(image)).astype(int)
    assert np.abs(exact - fast).max() <= TOLERANCE["torch"]


@pytest.mark.parametrize("key, value", [("image_resize", "nearest"), ("aspect_ratio", "anyres")])
def test_an_unknown_setting_is_refused(key, value):
    with pytest.raises(ConfigError, match=f"{value}.*choose one of"):
        ImageTransform(32, **{key: value})


def test_pad_to_square_keeps_the_image_in_the_middle():
    square = pad_to_square(Image.new("RGB", (3, 8), (9, 9, 9)), (1, 2, 3))
    assert square.size == (8, 8)
    assert [square.getpixel((x, 0)) for x in range(8)] == [(1, 2, 3)] * 2 + [(9, 9, 9)] * 3 + [(1, 2, 3)] * 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
@pytest.mark.parametrize("aspect_ratio", ["square", "pad"])
def test_every_mode_comes_out_as_rgb(mode, aspect_ratio):
    image = _noise(30, 20)
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "RGB", "LAB"))
    else:
        image = (image.convert("L") if mode in ("LA", "PA", "1") else image).convert(mode)
    pixels = ImageTransform(32, aspect_ratio)(image)
    assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bits_are_scaled_not_clipped(mode, tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(4, 0)
    if mode == "I":
        image = Image.fromarray(ramp.astype(np.int32))
    elif mode == "I;16B":
        image = Image.frombytes("I;16B", (64, 4), ramp.astype(">u2").tobytes())
    else:
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        image = open_image(tmp_path / "ramp.png")
        assert image.mode.startswith("I")
    grey = np.asarray(to_rgb(image))[0, :, 0]
    np.testing.assert_allclose(grey, ramp[0] / 257, atol=0.51)


@pytest.mark.parametrize("dtype, words", [(np.float32, "floating-point"), (np.int32, "32-bit")])
def test_images_of_unknown_range_are_refused(dtype, words):
    with pytest.raises(DataError, match=words):
        to_rgb(Image.fromarray(np.full((2, 2), 70000, dtype)))


def test_exif_orientation_is_llavas_by_default_and_turns_on_request(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert to_rgb(image).size == (40, 20)
    assert to_rgb(image, exif_transpose=True).size == (20, 40)
    as_stored = ImageTransform(16, "pad").open(tmp_path / "turned.jpg")
    upright = ImageTransform(16, "pad", exif_transpose=True).open(tmp_path / "turned.jpg")
    assert torch.equal(upright, as_stored.transpose(1, 2))


def test_transparency_is_dropped_as_in_llava_or_laid_on_a_colour():
    image = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    assert to_rgb(image).getpixel((0, 0)) == (10, 20, 30)
    assert to_rgb(image, background=(255, 255, 255)).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30])
    palette.info["transparency"] = 0
    assert to_rgb(palette, background=(255, 0, 0)).getpixel((0, 0)) == (255, 0, 0)


_LIBRARIES = {"skimage": "data", "sklearn": "datasets/images"}


def _library_photographs():
    found = [(importlib.util.find_spec(package), folder) for package, folder in _LIBRARIES.items()]
    folders = [Path(spec.origin).parent / folder for spec, folder in found if spec]
    return sorted(file for folder in folders for file in folder.iterdir() if file.suffix in (".png", ".jpg", ".gif"))


@pytest.mark.parametrize("file", _library_photographs(), ids=lambda file: file.name)
def test_photographs_of_other_libraries(file):
    for aspect_ratio in ("square", "pad"):
        pixels = ImageTransform(64, aspect_ratio).open(file)
        assert pixels.shape == (3, 64, 64) and pixels.std() > 0.1  # something is to be seen


def _encoded(kind, **options):
    data = io.BytesIO()
    _noise(50, 40).save(data, kind, **options)
    return data.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_a_truncated_file_is_damaged(kind, tmp_path):
    data = _encoded(kind)
    (tmp_path / "half.img").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="half.img.*(damaged|not an image)"):
        open_image(tmp_path / "half.img")


@pytest.mark.parametrize(
    "data", [b"", b"<html>404</html>", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\0" * 99]
)
def test_a_file_that_is_no_image_is_refused(data, tmp_path):
    file = tmp_path / "page.jpg"
    with pytest.raises(DataError, match="no image file .*page.jpg"):
        open_image(file)
    file.write_bytes(data)
    with pytest.raises(DataError, match="page.jpg is not an image"):
        open_image(file)


def test_damage_never_escapes_as_another_exception(tmp_path):
    rng = np.random.default_rng(1)
    transform = ImageTransform(16, "pad", exif_transpose=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = tmp_path / "x.img"
    originals = [_encoded(kind, exif=exif) for kind in ("JPEG", "PNG", "WEBP", "TIFF")]
    originals += [_encoded(kind) for kind in ("GIF", "BMP", "PPM")]
    opened = 0
    for _ in range(300):
        data = bytearray(originals[rng.integers(len(originals))])
        for position in rng.integers(0, min(len(data), 300), rng.integers(0, 8)):
            data[position] = rng.integers(256)
        file.write_bytes(bytes(data[: rng.integers(1, len(data) + 1)]) if rng.random() < 0.3 else bytes(data))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                opened += transform.open(file).shape == (3, 16, 16)
            except DataError as error:
                assert "x.img" in str(error)
    assert opened > 30


def test_a_decompression_bomb_is_refused_unread(tmp_path):
    Image.new("1", (4000, 3000)).save(tmp_path / "bomb.png")
    with pytest.raises(DataError, match="bomb.png has 4000 x 3000 pixels"):
        open_image(tmp_path / "bomb.png", max_pixels=1_000_000)
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match="huge.png is too large"):
            open_image(tmp_path / "huge.png")


@pytest.mark.parametrize(("aspect_ratio", "size"), [("pad", (30_000, 2)), ("square", (1, 20_000))])
def test_an_image_that_grows_into_a_bomb_is_refused(aspect_ratio, size, tmp_path):
    """Padding one image or resizing the other would take gigabytes."""
    Image.new("L", size).save(tmp_path / "line.png")
    with pytest.raises(DataError, match="line.png: .*too long and thin"):
        ImageTransform(336, aspect_ratio).open(tmp_path / "line.png")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images" / "sub").mkdir(parents=True)
    for name in ("images/a.png", "images/sub/b.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "images"


def test_names_inside_the_folder_are_found(folder):
    link = folder.parent / "link"
    link.symlink_to(folder)
    for name in ("a.png", "sub/b.png", "sub/../a.png", "./a.png"):
        assert resolve_image(folder, name).samefile(folder / name)
        assert resolve_image(link, name).samefile(folder / name)


@pytest.mark.parametrize(
    "name, message",
    [(name, "leads out of") for name in ("../outside.png", "sub/../../outside.png", "..", "sub/../..")]
    + [("/a.png", "absolute path"), ("absent.png", "no image 'absent.png'"), ("sub", "not a file")],
)
def test_other_names_are_refused(folder, name, message):
    with pytest.raises(DataError, match=message):
        resolve_image(folder, name)


def test_links_out_of_the_folder_are_refused_unless_allowed(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    (folder / "linked").symlink_to(folder.parent)
    (folder / "inner.png").symlink_to(folder / "a.png")
    for name in ("link.png", "linked/outside.png"):
        with pytest.raises(DataError, match="through a link"):
            resolve_image(folder, name)
        assert resolve_image(folder, name, allow_links=True).exists()
    assert resolve_image(folder, "inner.png").exists()


def test_names_of_other_systems_and_whole_paths_inside_the_folder_are_found(tmp_path):
    (tmp_path / "set").mkdir()
    for name in ("set/a.PNG", "odd\\name.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, "PNG")
    for name in ("set/a.PNG", "set\\a.PNG", str(tmp_path / "set" / "a.PNG")):
        assert resolve_image(tmp_path, name) == tmp_path / "set" / "a.PNG"
    assert resolve_image(tmp_path, "odd\\name.png") == tmp_path / "odd\\name.png"
    for name, message in (
        ("set/a.jpg", "there is no image 'set/a.jpg' .*; there is 'a.PNG'"),
        ("C:\\set\\a.PNG", "absolute path"),
        ("set\\..\\..\\a.PNG", "leads out of the image folder"),
        (str(tmp_path.parent / "a.png"), "absolute path outside the image folder"),
        (f"{tmp_path}/../a.png", "absolute path outside"),
    ):
        with pytest.raises(DataError, match=message):
            resolve_image(tmp_path, name)
