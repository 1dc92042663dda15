"""Data sets that were prepared, and sources of a user's own."""

import io
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from pkkd_jax import data
from pkkd_jax.names import UserError


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


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "resized_crop"])
def test_a_users_own_source_needs_no_more_than_the_protocol(augmentation):
    own = data.build_source(
        "train", name=f"{__name__}.Unhashable", data_dir="", augmentation=augmentation
    )
    batches = list(data.eval_batches(own, batch_size=4, num_devices=2))
    seen = np.concatenate([b["image"][b["mask"] == 1] for b in batches])
    np.testing.assert_array_equal(seen, np.arange(6)[:, None, None, None] + np.zeros((1, 4, 4, 1)))
