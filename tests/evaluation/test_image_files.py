"""Folders of pictures are scored as the data sets made of them are trained on."""

import numpy as np
import pytest
from PIL import Image

from sora_jax.data.media import open_media
from sora_jax.evaluation.image_files import ImageFiles

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (3, 6, 6, 3), np.uint8)


def write(folder, images, **options):
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{i}.png", **options)
    return folder


def read(folder):
    return np.concatenate(list(ImageFiles(folder).batches(2)))


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter clockwise
    return exif


def test_pictures_are_read_as_training_reads_them(tmp_path):
    clear = np.zeros((6, 6), bool)
    clear[:3, :3] = True
    transparent = [np.dstack([image, np.where(clear, 0, 255).astype(np.uint8)]) for image in IMAGES]
    found = read(write(tmp_path / "transparent", transparent))
    np.testing.assert_array_equal(found, np.where(clear[..., None], 255, IMAGES))
    found = read(write(tmp_path / "turned", np.ascontiguousarray(np.rot90(IMAGES, axes=(1, 2))), exif=turned()))
    np.testing.assert_array_equal(found, IMAGES)
    grey = IMAGES[..., 0]
    np.testing.assert_array_equal(
        read(write(tmp_path / "deep", grey.astype(np.uint16) * 257)), read(write(tmp_path / "grey", grey))
    )
    for folder in ("transparent", "turned", "deep", "grey"):
        _, frames = open_media(str(tmp_path / folder / "1.png"))
        np.testing.assert_array_equal(np.asarray(next(frames)), read(tmp_path / folder)[1])


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    folder = write(tmp_path / "mac", IMAGES)
    (folder / "._0.png").write_bytes(bytes.fromhex("00051607") + bytes(100))
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "scores.json"):
        (folder / name).write_bytes(b"{}" * 10)
    (folder / "more").mkdir()
    (folder / "2.png").rename(folder / "2.dat")  # by its content
    np.testing.assert_array_equal(read(folder), IMAGES)


@pytest.mark.parametrize("name", ["1.png", "1.jpg", "1.webp"])
def test_a_picture_that_is_not_whole_is_named(tmp_path, name):
    folder = write(tmp_path / "broken", IMAGES)
    (folder / "1.png").unlink()
    Image.fromarray(RNG.integers(0, 256, (6, 6, 3), np.uint8)).save(folder / name)
    (folder / name).write_bytes((folder / name).read_bytes()[:-50])
    with pytest.raises(ValueError, match=rf"broken/{name}: cannot be decoded"):
        read(folder)
    (folder / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=rf"broken/{name}: (not a picture|cannot be decoded)"):
        read(folder)


def test_an_animation_is_no_sample(tmp_path):
    folder = write(tmp_path / "moving", IMAGES)
    frames = [Image.fromarray(image) for image in IMAGES]
    frames[0].save(folder / "3.webp", save_all=True, append_images=frames[1:], duration=100)
    with pytest.raises(ValueError, match=r"moving/3.webp: is an animation of 3 frames"):
        read(folder)
