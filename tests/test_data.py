"""Order, sharding, augmentation and sources."""

import io
import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from pkkd_jax import data
from pkkd_jax.data import pipeline
from pkkd_jax.data.arrays import ArraySource
from pkkd_jax.data.pipeline import example_indices
from pkkd_jax.names import UserError


def source(count=23, augmentation="none"):
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    return ArraySource(
        images, np.arange(count, dtype=np.int32), count, (0.0,), (1.0,), augmentation
    )


def labels(num_devices, start=0, stop=5, **arguments):
    batches = data.train_batches(
        source(),
        batch_size=8,
        seed=3,
        start_step=start,
        stop_step=stop,
        num_devices=num_devices,
        **arguments,
    )
    return [batch["label"] for batch in batches]


def test_each_epoch_visits_each_example_once_though_batches_cross_its_border():
    stream = np.concatenate([b.ravel() for b in labels(1, 0, 23)])
    assert len(stream) == 8 * 23
    for epoch in stream.reshape(8, 23):
        assert sorted(epoch) == list(range(23))
    assert (stream[:23] != stream[23:46]).any()


def test_the_stream_is_a_function_of_seed_and_step():
    np.testing.assert_array_equal(labels(1, 3, 5), labels(1, 0, 5)[3:])
    assert (example_indices(0, 23, np.arange(23)) != example_indices(1, 23, np.arange(23))).any()


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_shards_of_devices_and_processes_are_the_one_batch(accumulate_steps):
    whole = labels(1, accumulate_steps=accumulate_steps)
    halves = [
        labels(4, device_slice=part, accumulate_steps=accumulate_steps) for part in ((0, 2), (2, 4))
    ]
    for one, *parts in zip(whole, *halves, strict=True):
        four = np.concatenate(parts)  # [devices, k, b]
        np.testing.assert_array_equal(four.swapaxes(0, 1).ravel(), one.ravel())


@pytest.mark.parametrize(("batch_size", "devices"), [(8, 1), (5, 4), (23, 2), (64, 4)])
def test_evaluation_counts_each_image_once(batch_size, devices):
    shares = [(0, devices)] if devices == 1 else [(0, devices // 2), (devices // 2, devices)]
    seen, counts = [], set()
    for share in shares:
        batches = list(
            data.eval_batches(
                source(), batch_size=batch_size, num_devices=devices, device_slice=share
            )
        )
        counts.add(len(batches))
        seen += [label for b in batches for label in b["label"][b["mask"] == 1]]
    assert sorted(seen) == list(range(23))
    assert len(counts) == 1


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=r"batch_size=8.*3 devices"):
        labels(3)


def augmented(images, positions, augmentation="crop_flip"):
    return data.augment(
        jax.random.key(5), images, positions, augmentation=augmentation, mean=(0.0,), std=(1.0,)
    )


def test_augmentation_does_not_depend_on_the_split_of_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (8, 9, 7, 1), np.uint8)
    whole = augmented(images, jnp.arange(8))
    parts = [augmented(images[i : i + 2], jnp.arange(i, i + 2)) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_crop_flip_is_a_shifted_window_of_the_padded_image_perhaps_mirrored():
    images = np.random.default_rng(0).integers(1, 256, (64, 9, 7, 1), np.uint8)
    found = np.asarray(augmented(images, jnp.arange(64)))
    seen = set()
    for image, result in zip(images, found, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        matches = [
            (i, j, flip)
            for i in range(9)
            for j in range(9)
            for flip in (False, True)
            if (padded[i : i + 9, j : j + 7][:, :: -1 if flip else 1] == result).all()
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {flip for *_, flip in seen} == {False, True}
    assert len({i for i, *_ in seen}) == 9


def test_without_augmentation_images_are_only_normalised():
    images = np.full((2, 3, 3, 1), 200, np.uint8)
    result = data.augment(
        jax.random.key(0), images, jnp.arange(2), augmentation="none", mean=(100.0,), std=(50.0,)
    )
    np.testing.assert_allclose(result, 2.0)


def test_digits_are_split_once_into_1437_and_360():
    train, test = (data.build_source(split, name="digits") for split in ("train", "test"))
    assert (len(train), len(test), train.image_shape) == (1437, 360, (8, 8, 1))
    assert train[0]["image"].dtype == np.uint8
    assert set(train.labels) == set(test.labels) == set(range(10))
    np.testing.assert_allclose(train.images.mean(), train.mean[0], atol=0.5)
    np.testing.assert_allclose(train.images.std(), train.std[0], atol=0.5)


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
    boxes = [pipeline.random_box((500, 375), rng.random((10, 4)).tolist()) for _ in range(2000)]
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
    assert pipeline.random_box((400, 4), rng.random((10, 4)).tolist()) == (197, 0, 202, 4)


def test_the_middle_is_seven_eighths_of_the_shorter_side():
    assert pipeline.centre_box((512, 256), (224, 224)) == (144, 16, 368, 240)


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


def test_a_damaged_record_is_left_out_with_a_warning_up_to_the_limit(prepared):
    root, images = prepared
    path = root / "cifar10" / "3.0.2" / "cifar10-train.array_record-00000-of-00001"
    content = bytearray(path.read_bytes())
    place = content.find(b"IDAT", content.find(b"IDAT") + 4) + 200  # in the second image
    content[place : place + 4] = b"ruin"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="example 1 .* cannot be read .*1 of at most 1 left out"):
        source = data.build_source("train", data.Damage(1), name="cifar10", data_dir=str(root))
    np.testing.assert_array_equal(source.arrays()[0], images[[0, 2, 2, 3, 4]])
    (batch,) = data.eval_batches(source, batch_size=5, num_devices=1)
    np.testing.assert_array_equal(batch["mask"], [[1, 0, 1, 1, 1]])
    with pytest.raises(UserError, match=r"config.max_damaged=0 allows none"):
        data.build_source("train", name="cifar10", data_dir=str(root))


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("features.json", "tensorflow_datasets.core.features.image_feature.Image", "os.system"),
        ("dataset_info.json", '"name": "train"', '"name": "../../secret"'),
        ("dataset_info.json", "{DATASET}-{SPLIT}", "../{DATASET}-{SPLIT}"),
        ("dataset_info.json", '"3.0.2"', '"/etc"'),
    ],
)
def test_a_description_that_names_code_or_other_directories_is_refused(prepared, file, old, new):
    path = prepared[0] / "cifar10" / "3.0.2" / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UserError, match=r"outside (tensorflow_datasets|its directory)"):
        data.build_source("train", name="cifar10", data_dir=str(prepared[0]))


class Unhashable:
    """A user's own source with no more than the protocol."""

    num_classes, image_shape, mean, std = 3, (4, 4, 1), (0.0,), (1.0,)
    __hash__ = None

    def __init__(self, split, data_dir, augmentation="none"):
        self.augmentation = augmentation

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": np.full((4, 4, 1), index, np.uint8), "label": index % 3}


class Wrong(Unhashable):
    """Returns what `kind` says, a keyword that is also a word of the package's own."""

    def __init__(self, split, data_dir, kind, augmentation):
        super().__init__(split, data_dir, augmentation)
        self.kind = kind

    def __getitem__(self, index):
        found = super().__getitem__(index)
        if self.kind == "float":
            found["image"] = found["image"] / 255
        if self.kind == "channels first":
            found["image"] = np.zeros((3, 4, 4), np.uint8)
        if self.kind == "labels from 1":
            found["label"] += 1
        return found


WRONG = {
    "float": r"image 0 .* is float64 \(4, 4, 1\): expected uint8",
    "channels first": r"image 0 .*(\(3, 4, 4\): expected image_shape=|4 channels: expected 1)",
    "labels from 1": r"label 3 of example 2 .* expected from 0 to 2",
}


@pytest.mark.parametrize("augmentation", ["none", "resized_crop"])
@pytest.mark.parametrize("kind", WRONG)
def test_what_a_users_own_source_gets_wrong_is_said(kind, augmentation):
    def read():
        own = data.build_source(
            "train", name=f"{__name__}.Wrong", data_dir="", kind=kind, augmentation=augmentation
        )
        list(data.eval_batches(own, batch_size=4, num_devices=2))

    with pytest.raises(UserError, match=WRONG[kind]):
        read()


def bare(split):
    return [split]


def test_a_source_that_lacks_an_attribute_is_refused():
    with pytest.raises(UserError, match="has no 'num_classes'"):
        data.build_source("train", name=f"{__name__}.bare")


class Deadly(Unhashable):
    """Ends the process that reads its third example, unless that is the test's."""

    def __init__(self, split, data_dir, test_process):
        super().__init__(split, data_dir, "resized_crop")
        self.test_process = test_process

    def __getitem__(self, index):
        if index == 3 and os.getpid() != self.test_process:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_worker_that_dies_is_an_error_and_no_hang():
    own = data.build_source(
        "test", name=f"{__name__}.Deadly", data_dir="", test_process=os.getpid()
    )
    with pytest.raises(UserError, match=r"died \(exit status -9.*config.workers \(now 1\)"):
        list(data.eval_batches(own, batch_size=2, num_devices=1, workers=1))


def test_images_of_another_size_are_refused_where_one_is_wanted(photographs):
    with pytest.raises(UserError, match="50x40, not 16x16"):
        data.build_source(
            "train",
            name="folder",
            data_dir=str(photographs),
            image_size=16,
            augmentation="crop_flip",
        )


def test_a_data_set_that_is_not_prepared_names_directory_and_command(tmp_path):
    with pytest.raises(UserError) as error:
        data.build_source("train", name="cifar10", data_dir=str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "python -m pkkd_jax.data.prepare cifar10 --data_dir" in str(error.value)


def test_a_damaged_data_set_is_one_line(tmp_path):
    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as error:
        data.build_source("train", name="cifar10", data_dir=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.fixture
def prepared(tmp_path):
    """CIFAR-10 as TFDS lays it out, 5 images to train and 3 to test."""
    from array_record.python.array_record_module import ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    folder = tmp_path / "cifar10" / "3.0.2"
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    splits = []
    for split, start, stop in (("train", 0, 5), ("test", 5, 8)):
        writer = ArrayRecordWriter(
            str(folder / f"cifar10-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        for i in range(start, stop):
            png = io.BytesIO()
            Image.fromarray(images[i]).save(png, "PNG")
            example = tf_example_pb2.Example()
            example.features.feature["image"].bytes_list.value.append(png.getvalue())
            example.features.feature["label"].int64_list.value.append(i)
            writer.write(example.SerializeToString())
        writer.close()
        splits.append(
            {
                "name": split,
                "shardLengths": [str(stop - start)],
                "numBytes": "1",
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            }
        )
    info = {"name": "cifar10", "version": "3.0.2", "fileFormat": "array_record", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    core = "tensorflow_datasets.core.features."
    features = {
        "image": {"image": {"dtype": "uint8", "shape": {"dimensions": ["32", "32", "3"]}},
                  "pythonClassName": core + "image_feature.Image"},
        "label": {"classLabel": {"numClasses": "10"},
                  "pythonClassName": core + "class_label_feature.ClassLabel"},
    }  # fmt: skip
    (folder / "features.json").write_text(
        json.dumps(
            {
                "pythonClassName": core + "features_dict.FeaturesDict",
                "featuresDict": {"features": features},
            }
        )
    )
    return tmp_path, images


def test_a_prepared_data_set_is_read_without_tensorflow(prepared):
    root, images = prepared
    for split, part in (("train", slice(0, 5)), ("test", slice(5, 8))):
        source = data.build_source(split, name="cifar10", data_dir=str(root))
        found, labels = source.arrays()
        np.testing.assert_array_equal(found, images[part])
        np.testing.assert_array_equal(labels, np.arange(8)[part])
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "resized_crop"])
def test_a_users_own_source_needs_no_more_than_the_protocol(augmentation):
    own = data.build_source(
        "train", name=f"{__name__}.Unhashable", data_dir="", augmentation=augmentation
    )
    batches = list(data.eval_batches(own, batch_size=4, num_devices=2))
    seen = np.concatenate([b["image"][b["mask"] == 1] for b in batches])
    np.testing.assert_array_equal(seen, np.arange(6)[:, None, None, None] + np.zeros((1, 4, 4, 1)))


def test_preparing_an_unknown_data_set_names_the_nearest(capsys):
    from pkkd_jax.data import prepare

    assert prepare.main(["cifar11"]) == 2
    assert "did you mean 'cifar10'" in capsys.readouterr().err


def test_the_package_imports_without_tensorflow():
    code = (
        "import sys; import pkkd_jax.main, pkkd_jax.evaluate; from pkkd_jax import data;"
        "data.build_source('test', name='digits');"
        "assert 'tensorflow' not in sys.modules; assert 'tensorflow_datasets' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_validation_images_are_held_out_of_the_training_ones():
    def found(split, **keywords):
        source = data.build_source(split, name="digits", **keywords)
        return [source.images[i].tobytes() for i in range(len(source))]

    everything = found("train")
    train, held_out = (found(split, validation=200) for split in ("train", "validation"))
    assert len(held_out) == 200
    assert sorted([*train, *held_out]) == sorted(everything)
    assert held_out == found("validation", validation=200)
    assert found("test", validation=200) == found("test")


@pytest.mark.parametrize("validation", [-1, 1437])
def test_more_validation_images_than_there_are_is_refused(validation):
    with pytest.raises(UserError, match=rf"validation={validation}.*1437 training images"):
        data.build_source("validation", name="digits", validation=validation)
