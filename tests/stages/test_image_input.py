"""Pictures that callers give: what becomes of each kind, and every kind that is none refused by name."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from tests.bad_input.conftest import refused
from twinflow_rt.config import SizeRule
from twinflow_rt.errors import ConfigError
from twinflow_rt.stages.image_input import MAX_SIDE, STRENGTH, resolve_images

SIZES = SizeRule(16, 256, 512, default=64)
NAN = float("nan")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (32, 48, 3), np.uint8)
PICTURE = Image.fromarray(PIXELS)


def given(image=PICTURE, mask=None, strength=None, prompts=1, repeats=1, size=(None, None)):
    made, resolved = resolve_images(image, mask, strength, prompts, repeats, SIZES, size)
    assert made is not None and made.pixels.shape[2:] == resolved
    return made


def test_kinds_are_the_same_picture(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255
    kinds = [PICTURE, PIXELS, tmp_path / "a.png", str(tmp_path / "a.png"), expected, [PICTURE], expected[None],
             PIXELS[None], np.dstack((PIXELS, np.full((32, 48), 255, np.uint8)))]  # fmt: skip
    for kind in kinds:
        assert torch.equal(given(kind).pixels[0], expected)
    assert given().strength == STRENGTH == 0.6 and given().mask is None
    gray = given(PIXELS[..., 0]).pixels[0]
    assert torch.equal(gray, expected[:1].expand(3, -1, -1)) and torch.equal(given(PIXELS[..., :1]).pixels[0], gray)
    assert resolve_images(None, None, None, 2, 1, SIZES, (16, None)) == (None, (16, 64))


@pytest.mark.parametrize("size", [(None, None), (64, 32), (16, None)])
def test_sizes_are_diffusers(size):
    picture = Image.fromarray(RNG.integers(0, 256, (50, 37, 3), np.uint8))
    expected = VaeImageProcessor(vae_scale_factor=16).preprocess(picture, height=size[0], width=size[1])
    assert torch.allclose(given(picture, size=size).pixels, expected / 2 + 0.5, atol=1e-7)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    assert (given(tensor, size=size).pixels - (expected / 2 + 0.5)).abs().mean() < 0.05  # by another filter


def test_orientation_and_transparency(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    PICTURE.save(tmp_path / "turned.png", exif=exif)
    assert given(tmp_path / "turned.png").pixels.shape == (1, 3, 48, 32)
    clear = PICTURE.copy()
    clear.putalpha(Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(48, 1)))
    pixels = given(clear).pixels[0]
    assert (pixels[:, :16] == 1).all() and torch.equal(pixels[:, 16:], given().pixels[0, :, 16:])
    painted = given(mask=clear).mask
    assert painted[..., :16, :].all() and not painted[..., 16:, :].any()  # where it is transparent
    palette = PICTURE.convert("P")
    palette.info["transparency"] = 0
    assert given(palette).pixels.shape == (1, 3, 32, 48)
    for mode in ("L", "1", "P", "CMYK", "LA", "YCbCr"):
        assert given(PICTURE.convert(mode)).pixels.shape == (1, 3, 32, 48)


def test_masks_are_diffusers():
    mask = Image.fromarray(RNG.integers(0, 256, (32, 48), np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    for size in ((None, None), (64, 96)):
        ours = given(mask=mask, size=size)
        expected = processor.preprocess(mask, height=size[0], width=size[1])
        assert torch.equal(ours.mask.float(), expected)
        cells = torch.nn.functional.interpolate(expected, size=[side // 8 for side in expected.shape[2:]])
        assert torch.equal(ours.latent_mask(8).float(), cells)
    half = np.arange(48) < 24
    for kind in (
        np.tile(half, (32, 1)),
        torch.from_numpy(np.tile(half, (32, 1))),
        half[None].repeat(32, 0) * np.uint8(255),
    ):
        assert given(mask=kind).mask[0, 0, 0].sum() == 24


def test_kept_pixels_are_exact():
    mask = np.zeros((32, 48), np.uint8)
    mask[:, 10:] = 255
    ours, made = given(mask=mask), torch.zeros(1, 32, 48, 3, dtype=torch.uint8)
    assert np.array_equal(ours.keep(made)[0, :, :10], PIXELS[:, :10]) and not ours.keep(made)[0, :, 10:].any()
    assert given().keep(made) is made


def test_numbers():
    two = [PICTURE, PICTURE]
    assert given(two, prompts=2, repeats=2).numbers == (0, 0, 1, 1)
    assert given(two, prompts=1, repeats=2).numbers == (0, 1)
    assert given(prompts=2, repeats=2).numbers == (0, 0, 0, 0)
    masks = [np.zeros((32, 48), np.uint8), np.full((32, 48), 255, np.uint8)]
    assert given(two, masks, prompts=2, repeats=2).mask.float().mean((1, 2, 3)).tolist() == [0, 0, 1, 1]
    assert not given(two, masks[0], prompts=2).mask.any()


def truncated():
    file = io.BytesIO()
    PICTURE.save(file, format="PNG")
    return file.getvalue()[:200]


WRONG = [
    ({"strength": 0}, "strength must be a number above 0"), ({"strength": -0.5}, "strength"),
    ({"strength": 1.01}, "strength"), ({"strength": NAN}, "strength"), ({"strength": "0.5"}, "strength"),
    ({"strength": True}, "strength"), ({"strength": [0.5]}, "strength"),
    ({"image": PIXELS[:1, :1]}, "image has 1x1 pixels; a side must have 16"),
    ({"image": PIXELS[:15]}, "a side must have 16"),
    ({"image": np.zeros((20_000, 20, 3), np.uint8)}, "1 to 16,384: give another size"),
    ({"image": Image.new("1", (20_000, 20_000))}, "image has 20000x20000 pixels"),
    ({"image": np.zeros((272, 64, 3), np.uint8)}, "this model makes 512x256 at most: give height= and width="),
    ({"image": torch.zeros(3, MAX_SIDE + 1, 16)}, "1 to 16,384"), ({"image": torch.zeros(3, 0, 16)}, "tensor"),
    ({"image": PIXELS.astype(np.float32)}, r"an array of float32.*\.round\(\)"),
    ({"image": PIXELS[None, None]}, "array|tensor"),
    ({"image": PIXELS[..., :2]}, "an array of uint8"), ({"image": np.zeros((0, 16, 3), np.uint8)}, "1 to 16,384"),
    ({"image": np.array("a")}, "an array"), ({"image": np.array([None])}, "an array"),
    ({"image": torch.zeros(3, 32, 32, dtype=torch.uint8)}, r"floats \[3, H, W\]"),
    ({"image": torch.zeros(32, 32, 3)}, r"floats \[3, H, W\]"), ({"image": torch.full((3, 32, 32), NAN)}, "outside"),
    ({"image": torch.full((3, 32, 32), 255.0)}, r"x / 255"), ({"image": torch.full((3, 32, 32), -1.0)}, "outside"),
    ({"image": 3}, "image must be a path"), ({"image": b"bytes"}, "image cannot be read"),
    ({"image": []}, "empty list"),
    ({"image": [PICTURE, None]}, "image must be a path"), ({"image": {}}, "image must be a path"),
    ({"image": "nowhere.png"}, "cannot be read"), ({"image": "."}, "cannot be read"),
    ({"image": "a\0b"}, "cannot be read"),
    ({"image": ""}, "cannot be read"), ({"image": "x" * 5000}, "cannot be read"),
    ({"image": Image.new("I;16", (32, 32))}, "kind I;16, not of 8 bits"),
    ({"image": Image.new("F", (32, 32))}, "kind F"),
    ({"image": [PICTURE] * 3}, "3 pictures, and 1 prompt"), ({"mask": [PICTURE] * 2}, "2 pictures"),
    ({"mask": PIXELS[:16]}, "mask has 48x16 pixels, its image 48x32: give one of the same size"),
    ({"mask": torch.zeros(3, 32, 48)}, r"floats \[1, H, W\]"), ({"mask": "nowhere.png"}, "mask 'nowhere.png' cannot"),
    ({"mask": 1}, "mask must be"), ({"image": None, "mask": PICTURE}, "mask= goes with image="),
    ({"image": None, "strength": 0.5}, "strength= goes with image="), ({"size": (17, None)}, "height 17"),
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong(wrong, message):
    refused(lambda: given(**wrong), message, ConfigError)


def test_broken_files(tmp_path):
    for name, content in (("a.png", truncated()), ("b.png", b""), ("c.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 99)):
        (tmp_path / name).write_bytes(content)
        refused(lambda name=name: given(tmp_path / name), "cannot be read.*give a whole picture", ConfigError)
    with Image.open(io.BytesIO(truncated())) as opened:
        refused(lambda: given(opened), "image cannot be read", ConfigError)
