"""Photographs of any size, decoded and cropped by threads or processes ahead of the training.

The crop of a training image is a function of seed and global position.
"""

import math
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from pkkd_jax.data.order import example_indices
from pkkd_jax.data.reading import Damage, Unreadable, example
from pkkd_jax.names import UserError

Box = tuple[float, float, float, float]


def random_box(size: tuple[int, int], draws: list[list[float]]) -> Box:
    """A random part of an image of `(width, height)`: 8 to 100% of its area, ratio 3/4 to 4/3.

    Args:
      size: of the image.
      draws: four uniform numbers of [0, 1) a try: area, ratio, left and top.
    Returns:
      `(left, top, right, bottom)`; the centre if no try fits into the image.
    """
    width, height = size
    for area, ratio, left, top in draws:
        area = (0.08 + 0.92 * area) * width * height
        ratio = (3 / 4) ** (1 - 2 * ratio)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left * (width - w + 1)), int(top * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(size: tuple[int, int], shape: tuple[int, int]) -> Box:
    """The middle of an image of `(width, height)`, for a crop of `shape` `(height, width)`.

    The same pixels as resizing the shorter side to 256/224 of the crop's and then cropping, in one
    pass.
    """
    width, height = size
    scale = min(width / shape[1], height / shape[0]) * 224 / 256
    w, h = shape[1] * scale, shape[0] * scale
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


class _Load:
    """Positions in the training stream, or indices of test images, to pixels and labels.

    An example that cannot be read is replaced by the next one that can: the indices tried in vain
    are in "unreadable" `[n, limit + 1]`, which is -1 elsewhere.
    """

    def __init__(self, source, seed: int | None, limit: int):
        self.source, self.seed, self.limit = source, seed, limit

    def __call__(self, positions: np.ndarray) -> dict[str, np.ndarray]:
        images = np.empty((len(positions), *self.source.image_shape), np.uint8)
        labels = np.empty(len(positions), np.int32)
        unreadable = np.full((len(positions), self.limit + 1), -1, np.int64)
        indices, draws = positions, [None] * len(positions)
        if self.seed is not None:
            indices = example_indices(self.seed, len(self.source), positions)
            rngs = (np.random.default_rng((self.seed, 1, int(p))) for p in positions)
            draws = [rng.random((10, 4)).tolist() for rng in rngs]
        for place in range(len(positions)):
            for tried in range(self.limit + 1):
                index = (int(indices[place]) + tried) % len(self.source)
                try:
                    images[place], labels[place] = self._cropped(index, draws[place])
                    break
                except Unreadable:
                    unreadable[place, tried] = index
        return {"image": images, "label": labels, "unreadable": unreadable}

    def _cropped(self, index: int, draws: list | None) -> tuple[np.ndarray, int]:
        # On its own, so that a photograph's memory is free, and in the cache, for the next.
        found = example(self.source, index)
        image = found["image"]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        shape = self.source.image_shape
        if len(image.getbands()) != shape[2]:
            raise UserError(
                f"image {index} of the data set has {len(image.getbands())} channels: expected"
                f" {shape[2]}, as its image_shape={shape} says"
            )
        box = random_box(image.size, draws) if draws else centre_box(image.size, shape[:2])
        image = image.resize(shape[1::-1], Image.Resampling.BILINEAR, box=box)
        return np.asarray(image).reshape(shape), found["label"]


def _live_with_parent(index: int, count: int) -> None:
    """Makes a process end with its parent, however that ends, and not before.

    Ctrl-C, which a terminal sends to every process, is left to the one that saves the run.
    """
    del index, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _stream(load: _Load, rows: np.ndarray, workers: int) -> Iterator[dict[str, np.ndarray]]:
    """The batch of each row of `rows` of `[batches, batch]`, read ahead by Grain."""
    import grain
    from absl import flags

    if workers and not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes read flags of their own, unset here
    # A batch is one element: handled image by image, Grain costs a tenth of the decoding.
    dataset = grain.MapDataset.source(rows).map(load)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = 0 if workers else cores
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterable = dataset.to_iter_dataset(options)
    if workers:
        iterable = iterable.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_live_with_parent
        )
    return iter(iterable)


def batches(
    source, positions: Iterable[np.ndarray], seed: int | None, workers: int, damage: Damage
) -> Iterator[tuple[np.ndarray, ...]]:
    """Examples at `positions`, an array of them after the other.

    Args:
      source: a split whose photographs have any size.
      positions: arrays of one shape, of positions in the training stream.
      seed: of order and crops; None for a test split, of which `positions` are indices.
      workers: processes that decode; 0 decodes in threads of this one.
      damage: counts examples that cannot be read, in whose place the next ones stand.
    Yields:
      In the shape of each array: images, labels and whether they are the wanted ones.
    Raises:
      UserError: if too many cannot be read, or a process that decodes died.
    """
    rows = np.stack(list(positions))
    shape, rows = rows.shape[1:], rows.reshape(len(rows), -1)
    stream = _stream(_Load(source, seed, damage.limit), rows, workers)
    try:
        for batch in stream:
            image, label, unreadable = batch["image"], batch["label"], batch["unreadable"]
            for index in unreadable[unreadable >= 0]:
                damage.note(source, int(index))
            if (unreadable[:, -1] >= 0).any():
                raise UserError("none of the data set's examples can be read: mend it")
            readable = (unreadable[:, 0] < 0).reshape(shape)
            yield image.reshape(*shape, *image.shape[1:]), label.reshape(shape), readable
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        status = re.search(r"exit code (-?\d+)", str(error))
        raise UserError(
            f"a process that decodes images died (exit status {status.group(1) if status else '?'};"
            " -9 is often too little memory): go on by the same command, with fewer of them by"
            f" config.workers (now {workers})"
        ) from error
    finally:
        stream.close()  # its processes, and what they hold in shared memory
