"""Data sets that TensorFlow Datasets has prepared, read without TensorFlow."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pkkd_jax.data.sources.arrays import ArraySource
from pkkd_jax.names import UserError

__all__ = ["cifar10", "cifar100", "fashion_mnist", "imagenet2012", "mnist"]


def _open(name: str, split: str, data_dir: str):
    """The split's `tfds.data_source`, whose images are still encoded bytes."""
    import tensorflow_datasets as tfds

    folder = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    folder = Path(folder).expanduser()
    place = f" --data_dir {folder}" if data_dir else ""
    if not any((folder / name).glob("*/dataset_info.json")):
        raise UserError(
            f"data set {name!r} is not prepared in {str(folder)!r}: run"
            f" `python -m pkkd_jax.data.prepare {name}{place}`, or name the right directory by"
            " --config.data.data_dir"
        )
    try:
        # By directory: TFDS would look the name up among its own builders, and those need more.
        newest = max((folder / name).glob("*/dataset_info.json")).parent
        builder = tfds.builder_from_directory(newest)
        return builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"data set {name!r} in {str(folder)!r} cannot be read ({type(error).__name__}: {text}):"
            f" prepare it again by `python -m pkkd_jax.data.prepare {name}{place}`"
        ) from error


def decode(encoded: bytes, mode: str) -> Image.Image:
    """The image in PNG or JPEG bytes, as "RGB" or "L"."""
    image = Image.open(io.BytesIO(encoded))
    return image if image.mode == mode else image.convert(mode)


def _in_memory(name, split, data_dir, num_classes, mean, std, augmentation, size):
    source = _open(name, split, data_dir)
    mode = "RGB" if len(mean) == 3 else "L"
    images = np.empty((len(source), size, size, len(mean)), np.uint8)
    labels = np.empty(len(source), np.int32)

    def fill(start):
        indices = range(start, min(start + 512, len(source)))
        for index, example in zip(indices, source.__getitems__(list(indices)), strict=True):
            pixels = np.asarray(decode(example["image"], mode))
            images[index] = pixels.reshape(images.shape[1:])
            labels[index] = example["label"]

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, len(source), 512)))
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
        self._source = _open("imagenet2012", name, data_dir)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict:
        example = self._source[index]
        return {"image": decode(example["image"], "RGB"), "label": int(example["label"])}
