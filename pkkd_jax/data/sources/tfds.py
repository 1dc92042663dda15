"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pkkd_jax.data.arrays import ArraySource
from pkkd_jax.names import UserError

__all__ = ["cifar10", "cifar100", "fashion_mnist", "imagenet2012", "mnist"]


class Records:
    """One split of a prepared TFDS data set, its images still encoded.

    Args:
      name: of a TFDS data set whose examples have an image and a label.
      split: as TFDS calls it.
      data_dir: directory of prepared data sets; `TFDS_DATA_DIR` or `~/tensorflow_datasets` if "".
    Raises:
      UserError: if the data set is not prepared there, or is damaged.
    """

    def __init__(self, name: str, split: str, data_dir: str):
        import tensorflow_datasets as tfds

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
            # TFDS's own parsing would cost as much as a tenth of a photograph's decoding.
            self._records = tfds.builder_from_directory(newest).as_data_source(
                split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
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

    def read(self, start: int, stop: int) -> list[tuple[bytes, int]]:
        """Neighbouring examples, which are faster to read together."""
        return [_parse(record) for record in self._records.__getitems__(list(range(start, stop)))]


def _parse(record: bytes) -> tuple[bytes, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(record).features.feature
    return feature["image"].bytes_list.value[0], feature["label"].int64_list.value[0]


def decode(encoded: bytes, mode: str) -> Image.Image:
    """The image in PNG or JPEG bytes, as "RGB" or "L"."""
    image = Image.open(io.BytesIO(encoded))
    return image if image.mode == mode else image.convert(mode)


def _in_memory(name, split, data_dir, num_classes, mean, std, augmentation, size):
    records = Records(name, split, data_dir)
    mode = "RGB" if len(mean) == 3 else "L"
    images = np.empty((len(records), size, size, len(mean)), np.uint8)
    labels = np.empty(len(records), np.int32)

    def fill(start):
        found = records.read(start, min(start + 512, len(records)))
        for index, (encoded, label) in enumerate(found, start):
            labels[index] = label
            images[index] = np.asarray(decode(encoded, mode)).reshape(images.shape[1:])

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(records), 512)))
    return ArraySource(images, labels, num_classes, mean, std, augmentation)


def mnist(split: str = "train", data_dir: str = ""):
    """70,000 grey 28x28 images of ten digits."""
    return _in_memory("mnist", split, data_dir, 10, (33.3,), (78.6,), "none", 28)


def fashion_mnist(split: str = "train", data_dir: str = ""):
    """70,000 grey 28x28 images of ten kinds of clothing."""
    return _in_memory("fashion_mnist", split, data_dir, 10, (72.9,), (90.0,), "none", 28)


def cifar10(split: str = "train", data_dir: str = ""):
    """60,000 colour 32x32 images of ten classes."""
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return _in_memory("cifar10", split, data_dir, 10, mean, std, "crop_flip", 32)


def cifar100(split: str = "train", data_dir: str = ""):
    """60,000 colour 32x32 images of a hundred classes."""
    mean, std = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)
    return _in_memory("cifar100", split, data_dir, 100, mean, std, "crop_flip", 32)


class imagenet2012:
    """1.28 million photographs of a thousand classes; "test" is the 50,000 validation images.

    Args:
      split: "train" or "test".
      data_dir: directory of prepared TFDS data sets.
      image_size: height and width that the network sees.
    """

    num_classes = 1000
    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)
    augmentation = "resized_crop"

    def __init__(self, split: str = "train", data_dir: str = "", image_size: int = 224):
        if image_size < 1:
            raise UserError(f"config.data.image_size={image_size}: it must be positive")
        self.image_shape = (image_size, image_size, 3)
        name = {"train": "train", "test": "validation"}[split]
        self._records = Records("imagenet2012", name, data_dir)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        encoded, label = self._records[index]
        return {"image": decode(encoded, "RGB"), "label": label}
