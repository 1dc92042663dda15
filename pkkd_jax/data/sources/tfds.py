"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import dataclasses
import functools
import io
import json
import os
from pathlib import Path

from PIL import Image

from pkkd_jax.names import UserError

__all__ = ["cifar10", "cifar100", "fashion_mnist", "imagenet2012", "mnist"]


class Records:
    """One split of a prepared TFDS data set, its images still encoded; opened when first read.

    Args:
      name: of a TFDS data set whose examples have an image and a label.
      split: as TFDS calls it.
      data_dir: directory of prepared data sets; `TFDS_DATA_DIR` or `~/tensorflow_datasets` if "".
    Raises:
      UserError: when first read, if the data set is not prepared there, or is damaged.
    """

    def __init__(self, name: str, split: str, data_dir: str):
        self._name, self._split, self._data_dir = name, split, data_dir

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        name, data_dir = self._name, self._data_dir
        folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        folder = Path(folder).expanduser()
        place = f" --data_dir {folder}" if data_dir else ""
        if not any((folder / name).glob("*/dataset_info.json")):
            raise UserError(
                f"data set {name!r} is not prepared in {str(folder)!r}: run"
                f" `python -m pkkd_jax.data.prepare {name}{place}`, or name the right directory by"
                " TFDS_DATA_DIR or the data_dir leaf or flag"
            )
        try:
            # By directory: TFDS would look the name up among its own builders, which need more.
            newest = max((folder / name).glob("*/dataset_info.json")).parent
            _check_description(newest)
            # TFDS's own parsing would cost as much as a tenth of a photograph's decoding.
            return tfds.builder_from_directory(newest).as_data_source(
                self._split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
            )
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise UserError(
                f"data set {name!r} in {str(folder)!r} cannot be read ({type(error).__name__}:"
                f" {text}): delete {str(folder / name)!r} and prepare it again by"
                f" `python -m pkkd_jax.data.prepare {name}{place}`"
            ) from error

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Encoded image and label."""
        return _parse(self._records[index])


def _check_description(folder: Path) -> None:
    """Refuses what would make TFDS import code of others, or read files elsewhere."""

    def classes(tree):
        if isinstance(tree, dict):
            yield from (tree[key] for key in ("pythonClassName", "type") if key in tree)
        if isinstance(tree, (dict, list)):
            for part in tree.values() if isinstance(tree, dict) else tree:
                yield from classes(part)

    for name in classes(json.loads((folder / "features.json").read_text())):
        if not str(name).startswith("tensorflow_datasets."):
            raise ValueError(f"features.json names {name!r}, from outside tensorflow_datasets")
    info = json.loads((folder / "dataset_info.json").read_text())
    places = [info, *info.get("splits", [])]
    for text in (p[k] for p in places for k in ("name", "version", "filepathTemplate") if k in p):
        if not isinstance(text, str) or Path(text).name != text or "\\" in text:
            raise ValueError(f"dataset_info.json names {text!r}, outside its directory")


def _parse(record: bytes) -> tuple[bytes, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    return feature["image"].bytes_list.value[0], feature["label"].int64_list.value[0]


def decode(encoded: bytes, mode: str) -> Image.Image:
    """The image in PNG or JPEG bytes, as "RGB" or "L"."""
    image = Image.open(io.BytesIO(encoded))
    return image if image.mode == mode else image.convert(mode)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """One split of a prepared TFDS data set of images, as a `data.Source`."""

    records: Records
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict:
        encoded, label = self.records[index]
        return {"image": decode(encoded, "RGB" if len(self.mean) == 3 else "L"), "label": label}


def mnist(split: str = "train", data_dir: str = "") -> Images:
    """70,000 grey 28x28 images of ten digits."""
    records = Records("mnist", split, data_dir)
    return Images(records, 10, (28, 28, 1), (33.3,), (78.6,), "none")


def fashion_mnist(split: str = "train", data_dir: str = "") -> Images:
    """70,000 grey 28x28 images of ten kinds of clothing."""
    records = Records("fashion_mnist", split, data_dir)
    return Images(records, 10, (28, 28, 1), (72.9,), (90.0,), "none")


def cifar10(split: str = "train", data_dir: str = "") -> Images:
    """60,000 colour 32x32 images of ten classes."""
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return Images(Records("cifar10", split, data_dir), 10, (32, 32, 3), mean, std, "crop_flip")


def cifar100(split: str = "train", data_dir: str = "") -> Images:
    """60,000 colour 32x32 images of a hundred classes."""
    mean, std = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
    return Images(Records("cifar100", split, data_dir), 100, (32, 32, 3), mean, std, "crop_flip")


def imagenet2012(split: str = "train", data_dir: str = "", image_size: int = 224) -> Images:
    """1.28 million photographs of a thousand classes; "test" is the 50,000 validation images.

    Args:
      split: "train" or "test".
      data_dir: directory of prepared TFDS data sets.
      image_size: height and width that the network sees.
    """
    if image_size < 1:
        raise UserError(f"config.data.image_size={image_size}: it must be positive")
    records = Records("imagenet2012", {"train": "train", "test": "validation"}[split], data_dir)
    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    return Images(records, 1000, (image_size, image_size, 3), mean, std, "resized_crop")
