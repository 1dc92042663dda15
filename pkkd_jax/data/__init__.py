"""Data: sources, one file each in `sources/`; batches on the host, augmentation on the device.

`order` says which example comes when, `reading` reads one, `photographs` decodes and crops many
ahead of time, and `pipeline` makes the batches.
"""

import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from pkkd_jax import names
from pkkd_jax.data.arrays import ATTRIBUTES, ArraySource, Part
from pkkd_jax.data.augment import AUGMENTATIONS, augment, normalise
from pkkd_jax.data.pipeline import eval_batches, take, train_batches
from pkkd_jax.data.reading import Damage, Unreadable, example

__all__ = [
    "Damage",
    "Source",
    "augment",
    "build_source",
    "eval_batches",
    "fingerprint",
    "normalise",
    "open_source",
    "take",
    "train_batches",
]


class Source(Protocol):
    """One split of a data set.

    A user's own is a class, or a function that returns such an object, named by its dotted path and
    called with `split` ("train" or "test"), `data_dir` ("" unless it is set) and its own keywords.

    Attributes:
      num_classes: number of labels.
      image_shape: `(height, width, channels)` that the network sees.
      mean: of each channel, of 255.
      std: likewise.
      augmentation: "none"; "crop_flip", for images of one size that fit into memory together; or
        "resized_crop", for images of any size, decoded one by one.
    """

    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: str

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`{"image": uint8 [height, width, channels] or a PIL image, "label": int}`."""


def open_source(split: str, *, name: str, validation: int = 0, **arguments: Any) -> Source:
    """The data source that a config calls `name`, as its function returns it.

    Those of TFDS read their files only when they are asked for examples: what they say of shape and
    classes can be had without the files. Arguments are those of `build_source`.
    """
    allowed = ("train", "test", *(["validation"] if validation else []))
    if split not in allowed:
        raise names.unknown("split", split, allowed)
    whole = "test" if split == "test" else "train"
    return names.call("pkkd_jax.data.sources", name, "data set", split=whole, **arguments)


def build_source(
    split: str, damage: Damage | None = None, *, name: str, validation: int = 0, **arguments: Any
) -> Source:
    """The data source that a config calls `name`; images that all have one size are in memory.

    Args:
      split: "train"; "test"; or "validation", training images that "train" then lacks.
      damage: counts examples that cannot be read, which are left out; None for none allowed.
      name: a function in `pkkd_jax.data.sources`, or a dotted path.
      validation: number of those; the same ones always.
      **arguments: for it; `data_dir` is where its files are, "" for the usual place.
    Raises:
      UserError: if there is no such source or it does not take these arguments, or its files are
        not there or too many of its examples cannot be read.
    """
    source = open_source(split, name=name, validation=validation, **arguments)
    for attribute in ATTRIBUTES:
        if not hasattr(source, attribute):
            raise names.UserError(f"data set {name!r} has no {attribute!r}: see data.Source")
    if not len(source):  # the first that needs the files
        raise names.UserError(f"data set {name!r} has no images for {split!r}: mend it")
    if source.augmentation not in AUGMENTATIONS:
        raise names.unknown("augmentation", source.augmentation, AUGMENTATIONS)
    if validation and split != "test":
        if not 0 < validation < len(source):
            raise names.UserError(
                f"config.data.validation={validation}: it must be from 0 (the test images judge) to"
                f" below the {len(source)} training images of {name!r}"
            )
        order = np.random.default_rng(0).permutation(len(source))
        chosen = order[:validation] if split == "validation" else order[validation:]
        source = Part(source, np.sort(chosen))
    if source.augmentation == "resized_crop" or hasattr(source, "arrays"):
        return source
    return _in_memory(source, damage or Damage())


def fingerprint(train: Source, test: Source, damage: Damage) -> dict[str, int | float]:
    """What tells two data sets apart without reading them: sizes, and 64 training examples.

    Returns:
      "train" and "test", the sizes; "labels_crc32"; and "pixel_mean", of 255, which another decoder
      of the same files changes by far less than 0.5.
    """
    chosen = np.unique(np.linspace(0, len(train) - 1, 64).astype(int))
    images, labels = take(train, chosen, damage)
    return {
        "train": len(train),
        "test": len(test),
        "labels_crc32": zlib.crc32(labels.astype("<i4").tobytes()),
        "pixel_mean": round(float(images.mean()), 3),
    }


def _in_memory(source: Source, damage: Damage) -> ArraySource:
    """All of `source`, as arrays; the next example stands in for one that cannot be read."""
    count, block = len(source), 512
    images, labels = np.empty((count, *source.image_shape), np.uint8), np.empty(count, np.int32)
    unreadable: dict[int, str] = {}

    def fill(start):
        for index in range(start, min(start + block, count)):
            try:
                found = example(source, index)
            except Unreadable as error:
                unreadable[index] = str(error)
                continue
            image, labels[index] = np.asarray(found["image"]), found["label"]
            image = image[..., None] if image.ndim == 2 else image  # a PIL image of one channel
            if image.shape != tuple(source.image_shape):
                raise names.UserError(
                    f"image {index} of the data set is {image.shape}: expected"
                    f" image_shape={tuple(source.image_shape)}, height, width and channels"
                )
            images[index] = image

    with ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(0, count, block)))
    for index, reason in sorted(unreadable.items()):
        damage.note(source, index, reason)
    readable = np.setdiff1d(np.arange(count), list(unreadable))
    if not readable.size:
        raise names.UserError(f"none of the data set's {count} examples can be read: mend it")
    for index in unreadable:
        other = readable[np.searchsorted(readable, index) % readable.size]
        images[index], labels[index] = images[other], labels[other]
    return ArraySource(
        images,
        labels,
        source.num_classes,
        source.mean,
        source.std,
        source.augmentation,
        tuple(unreadable),
    )
