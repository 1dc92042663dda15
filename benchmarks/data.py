"""Rates of the host pipeline on one core, beside what the same core does without it.

python benchmarks/data.py [--data_dir DIR] [--image_size 224]

CIFAR-10 in memory: the training stream (shuffled, cut into shards) beside a bare copy of the same
images in order. ImageNet: the training stream (read, decode, random resized crop) beside a bare
loop of Pillow over the same photographs and crops, whose bytes are in memory already. Both of a
pair alternate, five times; the medians are printed.
"""

import argparse
import io
import os
import statistics
import time

import numpy as np
import PIL
from PIL import Image

from pkkd_jax import data
from pkkd_jax.data.order import example_indices
from pkkd_jax.data.photographs import random_box
from pkkd_jax.data.sources import tfds

REPEATS = 5
BATCH = 256
DEVICES = 8


def images_per_s(function, count: int) -> float:
    """Rate of `function`, which handles `count` images."""
    begin = time.perf_counter()
    function()
    return count / (time.perf_counter() - begin)


def compare(title: str, count: int, ours, bare) -> None:
    """Prints the median rates of `ours` and `bare`, and the median of their ratios."""
    pairs = [(images_per_s(ours, count), images_per_s(bare, count)) for _ in range(REPEATS)]
    rate, ceiling = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"{title}: {rate:,.0f} images/s; bare: {ceiling:,.0f}; ratio {ratio:.2f}", flush=True)


def cifar(data_dir: str) -> None:
    """Two epochs a repeat, shards of eight devices."""
    begin = time.perf_counter()
    source = data.build_source("train", name="cifar10", data_dir=data_dir)
    print(f"CIFAR-10: {len(source):,} images decoded in {time.perf_counter() - begin:.1f} s")
    steps = 2 * len(source) // BATCH
    repeat = iter(range(REPEATS))

    def ours():
        first = next(repeat) * steps  # new epochs, which are not shuffled yet
        for _ in data.train_batches(
            source,
            batch_size=BATCH,
            seed=0,
            start_step=first,
            stop_step=first + steps,
            num_devices=DEVICES,
        ):
            pass

    def bare():
        images = source.arrays()[0]
        for step in range(steps):
            start = step * BATCH % (len(images) - BATCH)
            images[start : start + BATCH].copy()

    compare("CIFAR-10, shuffled and sharded", steps * BATCH, ours, bare)


def imagenet(data_dir: str, image_size: int) -> None:
    """Each photograph several times a repeat, cropped elsewhere each time."""
    source = data.build_source(
        "train", name="imagenet2012", data_dir=data_dir, image_size=image_size
    )
    batch = min(32, len(source))
    steps = 512 // batch
    print(f"ImageNet: {len(source):,} photographs, {image_size} pixels, Pillow {PIL.__version__}")
    positions = range(steps * batch)
    indices = example_indices(0, len(source), np.array(positions))
    records = tfds.Records("imagenet2012", "train", data_dir)
    encoded = [io.BytesIO(records[i][0]) for i in range(len(records))]
    boxes = []
    for position, index in zip(positions, indices, strict=True):
        draws = np.random.default_rng((0, 1, position)).random((10, 4)).tolist()
        boxes.append(random_box(Image.open(encoded[index]).size, draws))

    def ours():
        for _ in data.train_batches(
            source,
            batch_size=batch,
            seed=0,
            start_step=0,
            stop_step=steps,
            num_devices=1,
        ):
            pass

    def bare():
        for index, box in zip(indices, boxes, strict=True):
            image = Image.open(encoded[index])
            image = image if image.mode == "RGB" else image.convert("RGB")
            image.resize((image_size, image_size), Image.Resampling.BILINEAR, box=box)

    compare("ImageNet, decoded and cropped", steps * batch, ours, bare)


def main() -> None:
    """Runs both on one core."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_dir", default="", help="prepared TFDS data sets")
    parser.add_argument("--image_size", type=int, default=224)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    else:
        print("this system does not bind a process to one core: rates are of all cores")
    cifar(arguments.data_dir)
    imagenet(arguments.data_dir, arguments.image_size)


if __name__ == "__main__":
    main()
