"""Pictures of every kind that a user may have become `pixel_values`, and come back."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor

from hf_dalle import DalleImageProcessor
from hf_dalle.image_processing_dalle import convert_to_rgb


def random_pixels(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12))
def test_crop_and_resize_are_pils(height, width, size):
    picture = Image.fromarray(random_pixels(height, width))
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    expected = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BOX)
    pixel_values = DalleImageProcessor(size=size).preprocess(picture).pixel_values
    assert pixel_values.shape == (1, 3, size, size) and pixel_values.dtype == torch.float32
    np.testing.assert_array_equal(pixel_values[0].permute(1, 2, 0).numpy(), np.asarray(expected, np.float32) / 255)


def test_resize_is_the_mean_of_each_area():
    pixels = np.random.default_rng(1).random((12, 12, 3), dtype=np.float32)
    means = pixels.reshape(4, 3, 4, 3, 3).mean(axis=(1, 3))
    pixel_values = DalleImageProcessor(size=4)(pixels).pixel_values
    np.testing.assert_allclose(pixel_values[0].permute(1, 2, 0), means, atol=1e-6)


def test_the_same_picture_in_every_form():
    pixels = random_pixels(16, 16)
    floats = pixels.astype(np.float32) / 255
    chw = torch.from_numpy(pixels).permute(2, 0, 1)
    processor = DalleImageProcessor(size=16)
    expected = torch.from_numpy(floats).permute(2, 0, 1)[None]
    for form in (
        Image.fromarray(pixels),
        pixels,
        floats,
        floats.astype(np.float64),
        chw,
        chw / 255,
        (chw / 255).double(),
    ):
        torch.testing.assert_close(processor.preprocess(form).pixel_values, expected)
    batch = processor.preprocess([Image.fromarray(pixels), floats, chw]).pixel_values
    torch.testing.assert_close(batch, expected.expand(3, -1, -1, -1))
    torch.testing.assert_close(processor.preprocess(np.stack([floats, floats])).pixel_values, batch[:2])
    torch.testing.assert_close(processor.preprocess(torch.stack([chw, chw])).pixel_values, batch[:2])
    assert processor.preprocess(pixels, return_tensors="np").pixel_values.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes_become_rgb(mode):
    picture = Image.fromarray(random_pixels(16, 16)).convert("RGB" if mode != "LAB" else "LAB")
    picture = picture.convert(mode) if mode != "LAB" else Image.new("LAB", (16, 16), (128, 128, 128))
    expected = DalleImageProcessor(size=8).preprocess(picture.convert("RGB")).pixel_values
    torch.testing.assert_close(DalleImageProcessor(size=8).preprocess(picture).pixel_values, expected)


def test_transparency_is_laid_on_white():
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = [255, 0, 0, 255]  # red above, below black that is fully transparent
    processor = DalleImageProcessor(size=4)
    grey = np.dstack([np.full((4, 4), 255 * (np.arange(4) < 2)[:, None]), rgba[..., 3]]).astype(np.uint8)
    palette = Image.fromarray(rgba).convert("P")  # keeps which entry is transparent
    keyed = Image.new("RGB", (4, 4), (255, 0, 0))
    keyed.paste((0, 0, 0), (0, 2, 4, 4))
    keyed.info["transparency"] = (0, 0, 0)
    for picture in (Image.fromarray(rgba), rgba, rgba / 255.0, palette, keyed):
        pixel_values = processor.preprocess(picture).pixel_values[0]
        assert pixel_values[:, 2:].eq(1).all(), "below: white"
        torch.testing.assert_close(pixel_values[:, 0, 0], torch.tensor([1.0, 0.0, 0.0]), atol=0.01, rtol=0)
    assert processor.preprocess(Image.fromarray(grey, "LA")).pixel_values.eq(1).all()
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 51))
    assert processor.preprocess(half).pixel_values.mean().item() == pytest.approx(0.8, abs=0.003)
    np.testing.assert_allclose(processor.preprocess(np.asarray(half)).pixel_values, 0.8, atol=1e-6)


def test_grey_arrays_and_16_bits():
    processor = DalleImageProcessor(size=4)
    grey = random_pixels(4, 4, 1)
    expected = torch.from_numpy(grey[..., 0] / 255).float().expand(1, 3, 4, 4)
    for form in (grey, grey[..., 0], Image.fromarray(grey[..., 0]), torch.from_numpy(grey[..., 0])):
        torch.testing.assert_close(processor.preprocess(form).pixel_values, expected)
    deep = Image.fromarray(grey[..., 0].astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    torch.testing.assert_close(processor.preprocess(deep).pixel_values, expected)


def test_photographs_are_turned_upright():
    picture = Image.fromarray(random_pixels(6, 6))
    exif = picture.getexif()
    exif[0x0112] = 3  # taken upside down
    picture.info["exif"] = exif.tobytes()
    turned = convert_to_rgb(picture)
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(picture)[::-1, ::-1])


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (None, "NoneType"),
        ("fox.png", "builtins.str"),
        ([], "no picture"),
        ([Image.new("RGB", (4, 4)), 3], "builtins.int"),
        (np.zeros((3, 8, 8)), r"\(3, 8, 8\).*height x width x channels"),
        (torch.zeros(8, 8, 3), r"\(8, 8, 3\).*channels x height x width"),
        (np.zeros((8, 0, 3)), r"\(8, 0, 3\)"),
        (np.zeros((1, 2, 8, 8, 3)), "cannot be read"),
        (np.zeros((8, 8, 3), np.int64), "int64"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "bool"),
        (np.full((8, 8, 3), 255.0), "from 255 to 255"),
        (torch.full((3, 8, 8), -1.0), "from -1 to -1"),
        (np.full((8, 8, 3), np.nan), "from nan"),
        (Image.new("F", (8, 8)), "'F'"),
        (Image.new("I", (8, 8)), "'I'"),
    ],
)
def test_what_is_no_picture_is_refused(image, words):
    with pytest.raises(ValueError, match=words):
        DalleImageProcessor(size=8).preprocess(image)


@pytest.mark.parametrize("size", [0, {"height": 8, "width": 4}, {"shortest_edge": 8}, None])
def test_size_is_a_square(size):
    with pytest.raises(ValueError, match="squares"):
        DalleImageProcessor(size=size)


def test_postprocess_inverts_preprocess():
    pixels = random_pixels(8, 8)
    processor = DalleImageProcessor(size=8)
    pixel_values = processor.preprocess([pixels, pixels]).pixel_values
    pictures = processor.postprocess(pixel_values)
    assert [picture.mode for picture in pictures] == ["RGB", "RGB"]
    np.testing.assert_array_equal(np.asarray(pictures[1]), pixels)
    arrays = processor.postprocess(pixel_values.bfloat16().requires_grad_(), "np")
    assert arrays.shape == (2, 8, 8, 3) and arrays.dtype == np.float32
    np.testing.assert_allclose(arrays[0] * 255, pixels, atol=1)
    torch.testing.assert_close(processor.postprocess(pixel_values, "pt"), pixel_values)
    assert processor.postprocess(pixel_values * 3 - 1, "pt").aminmax() == (0, 1)
    assert processor.postprocess(torch.full((1, 3, 8, 8), 99.7 / 255))[0].getpixel((0, 0)) == (100, 100, 100)
    with pytest.raises(ValueError, match="'jpg'"):
        processor.postprocess(pixel_values, "jpg")


def test_saves_and_loads(tmp_path):
    processor = DalleImageProcessor(size=24)
    processor.save_pretrained(tmp_path)
    for loaded in (DalleImageProcessor.from_pretrained(tmp_path), AutoImageProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is DalleImageProcessor
        assert loaded.to_dict() == processor.to_dict()
        assert loaded(random_pixels(30, 40)).pixel_values.shape == (1, 3, 24, 24)
