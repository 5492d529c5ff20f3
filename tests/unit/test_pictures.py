"""Pictures that videos begin with: sizes and pixels of the original, readings of odd files, and how prompts name them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features
from safetensors.torch import load_file

from sgm.data.images import ImageError, Picture, PictureError, cropped, open_picture, resized, size_of_short_side
from sgm.inference.prompts import Pictures, Prompt, PromptError, gather

PIXELS = np.random.default_rng(3).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return file


def read(image: Image.Image, kind: str = "PNG", **options: object) -> np.ndarray:
    return np.asarray(open_picture(saved(image, kind, **options)))


# --- as the original ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "height", "latent"),
    [
        (1360, 768, (96, 170)), (720, 480, (96, 144)), (480, 720, (144, 96)), (1920, 1080, (96, 170)),
        (640, 480, (96, 128)), (512, 512, (96, 96)), (776, 768, (96, 98)), (333, 777, (224, 96)),
    ],
)  # fmt: skip
def test_sizes_after_a_picture(width, height, latent):
    assert size_of_short_side(height, width, 768, 16) == (8 * latent[0], 8 * latent[1])


@pytest.mark.parametrize("name", ["40x60", "50x50", "60x40"])
def test_pixels_are_the_original_s(family_golden: Path, name):
    cases = load_file(family_golden / "image_preprocessing.safetensors")
    image = Image.fromarray(cases[f"{name}.uint8"].numpy())
    expected = cases[f"{name}.v15_short48"]
    size = size_of_short_side(image.height, image.width, 48, 16)
    torch.testing.assert_close(resized(image, size), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(cropped(image, (32, 48)), cases[f"{name}.v10_32x48"], rtol=0, atol=1e-5)


def test_a_picture_of_the_right_size_keeps_its_pixels():
    image = Image.fromarray(PIXELS)
    expected = torch.from_numpy(PIXELS).permute(2, 0, 1).float() / 255 * 2 - 1
    assert torch.equal(cropped(image, (24, 36)), expected) and torch.equal(resized(image, (24, 36)), expected)


# --- odd files ---------------------------------------------------------------------------------------------------------


def test_a_turned_picture_is_set_upright():
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    assert np.array_equal(read(image, exif=exif), np.rot90(PIXELS, -1))


def test_alpha_is_dropped():
    alpha = np.concatenate([PIXELS, np.zeros((24, 36, 1), np.uint8)], axis=2)
    assert np.array_equal(read(Image.fromarray(alpha)), PIXELS)


def test_an_animation_gives_its_first_picture():
    still = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    assert np.array_equal(read(still[0], save_all=True, append_images=still[1:]), PIXELS)


def test_sixteen_bits_of_gray_become_eight():
    deep = (np.arange(256, dtype=np.uint16) * 256).reshape(16, 16)
    assert np.array_equal(read(Image.fromarray(deep))[..., 1], deep >> 8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "CMYK", "1"])
def test_other_modes_are_colours_too(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    assert read(image, kind).shape == PIXELS.shape


def test_a_large_picture_is_read_without_a_word(monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 36 - 1)
    assert np.array_equal(read(Image.fromarray(PIXELS)), PIXELS) and not recwarn
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 36 // 2 - 1)
    with pytest.raises(PictureError, match="no readable picture .862 pixels at most"):
        read(Image.fromarray(PIXELS))


@pytest.mark.parametrize("cut", [0, 30, -200])
def test_a_picture_cut_short_is_none(cut):
    with pytest.raises(PictureError, match="no readable picture"):
        open_picture(io.BytesIO(saved(Image.fromarray(PIXELS)).read()[:cut]))


@pytest.mark.skipif(not features.check("avif"), reason="Pillow was built without AVIF")
def test_a_damaged_avif_is_none():
    """Pillow's decoder of this format raises RuntimeErrors."""
    content = saved(Image.fromarray(PIXELS), "AVIF").read()
    start = content.index(b"mdat") + 4
    with pytest.raises(PictureError, match="no readable picture .Failed to decode"):
        open_picture(io.BytesIO(content[:start] + bytes(len(content) - start)))


def test_broken_camera_notes_are_passed_over_without_a_word(recwarn):
    exif = b"Exif\0\0II*\0\x08\0\0\0\x05\0"  # five entries announced, none there
    assert read(Image.fromarray(PIXELS), "PNG", exif=exif).shape == PIXELS.shape and not recwarn.list
    with Image.open(saved(Image.fromarray(PIXELS), "PNG", exif=exif)) as image, pytest.warns(UserWarning, match="EXIF"):
        ImageOps.exif_transpose(image)  # so there was something to be silent of


def test_real_numbers_have_no_range():
    with pytest.raises(PictureError, match="real numbers.*save it as PNG"):
        read(Image.fromarray(PIXELS[..., 0].astype(np.float32)), "TIFF")


# --- how prompts name them ---------------------------------------------------------------------------------------------


@pytest.fixture
def fox(tmp_path) -> Path:
    path = tmp_path / "a fox.png"
    Image.fromarray(PIXELS).save(path)
    return path


def test_lines_name_pictures_beside_their_file(tmp_path, fox):
    other = tmp_path / "b.png"
    Image.fromarray(PIXELS[:16]).save(other)
    (tmp_path / "p.txt").write_text(f"one @@ a fox.png\n\ntwo@@{other}\nthree\n", encoding="utf-8")
    prompts, _ = gather([], str(tmp_path / "p.txt"), [], Pictures(True, str(other)))
    assert [(p.index, p.text, p.picture.path) for p in prompts] == [
        (0, "one", fox),
        (2, "two", other),
        (3, "three", other),
    ]
    assert (prompts[0].picture.width, prompts[0].picture.height) == (36, 24) and prompts[0].folder == "0_one"
    assert prompts[0].picture.sha256 != prompts[1].picture.sha256 == prompts[2].picture.sha256


def test_every_line_with_a_fault_is_named(tmp_path, fox):
    (tmp_path / "bad.png").write_bytes(fox.read_bytes()[:-200])
    lines = [
        "no picture",
        "two@@a.png@@b.png",
        "absent@@nowhere.png",
        "bad@@bad.png",
        f"a folder@@{tmp_path}",
        f"a@@{fox}",
    ]
    (tmp_path / "p.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(PromptError) as raised:
        gather([], str(tmp_path / "p.txt"), [], Pictures(True, other="configs/x.yaml"))
    said = str(raised.value).splitlines()
    assert said[0].startswith("5 problems") and len(said) == 6
    for line, word in zip(said[1:], ["TEXT@@IMAGE, or give --image", "stands 2 times", "nowhere.png does not exist",
                                     "bad.png: no readable picture", "is a folder"], strict=True):  # fmt: skip
        assert word in line
    assert "p.txt, line 1: no picture" in said[1] and "From text alone: configs/x.yaml." in said[1]


def test_a_picture_that_changes_meanwhile_is_noticed(fox):
    picture = Picture.of(fox)
    assert np.array_equal(np.asarray(picture.image()), PIXELS)
    Image.fromarray(255 - PIXELS).save(fox)
    with pytest.raises(ImageError, match="has changed"):
        picture.image()


def test_pointers_of_git_lfs_are_named(tmp_path):
    (tmp_path / "x.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(PromptError, match=r"prompt 0: .*x\.png is a Git LFS pointer"):
        Pictures(True).attach([Prompt(0, f"x@@{tmp_path}/x.png")])
