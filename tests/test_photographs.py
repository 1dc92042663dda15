"""Folders of photographs: cropped, decoded by threads and processes, left out where broken."""

import numpy as np
import pytest
from PIL import Image

from pkkd_jax import data
from pkkd_jax.data.photographs import centre_box, random_box
from pkkd_jax.names import UserError


@pytest.fixture
def photographs(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (40 + 3 * i, 50 - 2 * i, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def folder_batches(root, seed=0, start=0, workers=0, damage=None):
    train = data.build_source("train", name="folder", data_dir=str(root), image_size=16)
    return list(
        data.train_batches(
            train,
            batch_size=4,
            seed=seed,
            start_step=start,
            stop_step=4,
            num_devices=2,
            workers=workers,
            damage=damage,
        )
    )


def test_photographs_are_cropped_the_same_way_whenever_they_are_asked_for(photographs):
    batches, again = folder_batches(photographs), folder_batches(photographs, start=2)
    assert batches[0]["image"].shape == (2, 1, 2, 16, 16, 3)
    np.testing.assert_array_equal(batches[2]["image"], again[0]["image"])
    other = folder_batches(photographs, seed=1)
    assert (other[0]["image"] != batches[0]["image"]).any()


def test_random_parts_lie_inside_and_have_the_areas_and_ratios_of_the_recipe():
    rng = np.random.default_rng(0)
    boxes = [random_box((500, 375), rng.random((10, 4)).tolist()) for _ in range(2000)]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() == 500
    assert bottom.max() == 375
    area, ratio = (right - left) * (bottom - top) / (500 * 375), (right - left) / (bottom - top)
    assert 0.075 < area.min() < 0.1
    assert area.max() > 0.95
    assert 0.74 < ratio.min() < 0.77
    assert 1.30 < ratio.max() < 1.35
    assert random_box((400, 4), rng.random((10, 4)).tolist()) == (197, 0, 202, 4)


def test_the_middle_is_seven_eighths_of_the_shorter_side():
    assert centre_box((512, 256), (224, 224)) == (144, 16, 368, 240)


def test_all_photographs_are_evaluated_once(photographs):
    test = data.build_source("test", name="folder", data_dir=str(photographs), image_size=16)
    batches = list(data.eval_batches(test, batch_size=4, num_devices=2))
    assert sum(b["mask"].sum() for b in batches) == 6
    assert test.num_classes == 2


def test_processes_decode_what_threads_decode(photographs):
    threads, processes = (folder_batches(photographs, workers=workers) for workers in (0, 2))
    assert len(threads) == len(processes) == 4
    for a, b in zip(threads, processes, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photograph_is_named(photographs, workers):
    (photographs / "train" / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"example 0 .*cannot be read") as error:
        folder_batches(photographs, workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_photographs_are_left_out_with_a_warning_up_to_the_limit(photographs, workers):
    whole = folder_batches(photographs, workers=workers)
    for path in ("train/cat/1.png", "train/dog/3.png", "val/dog/2.png"):
        content = (photographs / path).read_bytes()
        (photographs / path).write_bytes(content[: len(content) // 2])
    with pytest.warns(UserWarning, match="cannot be read") as warned:
        batches = folder_batches(photographs, workers=workers, damage=data.Damage(2))
    texts = [str(w.message) for w in warned if "cannot be read" in str(w.message)]
    assert len(texts) == 2  # of 16 examples asked for, in which each comes once or twice
    assert all(any(f"example {index} " in text for text in texts) for index in (1, 8))
    assert "2 of at most 2 left out" in texts[1]
    differing = sum(
        (a["image"] != b["image"]).any((-1, -2, -3)).sum()
        for a, b in zip(batches, whole, strict=True)
    )
    assert 2 <= differing <= 4  # the others are what they would have been
    with (
        pytest.warns(UserWarning, match="1 of at most 1 left out"),
        pytest.raises(UserError, match=r"config.max_damaged=1 allows 1: mend or remove"),
    ):
        folder_batches(photographs, workers=workers, damage=data.Damage(1))
    test = data.build_source("test", name="folder", data_dir=str(photographs), image_size=16)
    with pytest.warns(UserWarning, match="example 5 "):
        found = list(
            data.eval_batches(
                test, batch_size=4, num_devices=2, workers=workers, damage=data.Damage(1)
            )
        )
    assert sum(b["mask"].sum() for b in found) == 5


def test_images_of_another_size_are_refused_where_one_is_wanted(photographs):
    with pytest.raises(UserError, match="50x40, not 16x16"):
        data.build_source(
            "train",
            name="folder",
            data_dir=str(photographs),
            image_size=16,
            augmentation="crop_flip",
        )
