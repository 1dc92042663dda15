"""The host's side: which example stands where in which batch, and its uint8 pixels.

Everything is a function of seed, step and global position: there is nothing to save.
"""

import functools
import math
import multiprocessing
import os
import re
import signal
import threading
import warnings
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pkkd_jax.names import UserError

Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(num_examples)


def example_indices(seed: int, num_examples: int, positions: np.ndarray) -> np.ndarray:
    """Examples at `positions` of the training stream, which visits each once in every epoch.

    Position p is element `p % num_examples` of the permutation of epoch `p // num_examples`;
    batches may cross the border of epochs.
    """
    positions = np.asarray(positions)
    epochs, places = np.divmod(positions, num_examples)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = _permutation(seed, int(epoch), num_examples)[places[here]]
    return indices


class Unreadable(ValueError):
    """An example that cannot be read; the message says why."""


def example(source, index: int) -> dict:
    """`source[index]`, decoded.

    Raises:
      Unreadable: if it cannot be.
      UserError: if it is not what a source is to return.
    """
    try:
        found = source[index]
        image, label = found["image"], found["label"]
        if isinstance(image, Image.Image):
            image.load()
        elif getattr(image, "dtype", None) != np.uint8 or image.ndim != 3:
            kind = (
                f"{image.dtype} {image.shape}" if hasattr(image, "dtype") else type(image).__name__
            )
            raise UserError(
                f"image {index} of the data set is {kind}: expected uint8 (height, width,"
                " channels), or a PIL image"
            )
        if not 0 <= label < source.num_classes:
            raise UserError(
                f"label {label} of example {index} of the data set: with its"
                f" num_classes={source.num_classes} expected from 0 to {source.num_classes - 1}"
            )
        return found
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of many kinds, by format and damage
        text = " ".join(str(error).split())[:200]
        raise Unreadable(f"{type(error).__name__}: {text}") from error


class Damage:
    """Examples of a data set that could not be read, which trainings do without.

    Args:
      limit: how many there may be.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self.found: dict[tuple[int, int], object] = {}  # keeps the sources, and their ids, alive

    def note(self, source, index: int, reason: str = "") -> None:
        """Counts an example, with a warning at its first time.

        Raises:
          UserError: if that is one too many.
        """
        if (id(source), index) in self.found:
            return
        self.found[id(source), index] = source
        if not reason:
            try:
                example(source, index)
            except Unreadable as error:
                reason = str(error)
        text = f"example {index} of the data set cannot be read ({reason})"
        if len(self.found) > self.limit:
            raise UserError(
                f"{text}, and config.max_damaged={self.limit} allows"
                f" {self.limit or 'none'}: mend or remove it, or allow more"
            )
        warnings.warn(f"{text}: {len(self.found)} of at most {self.limit} left out", stacklevel=2)


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

    def __call__(self, positions: np.ndarray) -> Batch:
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


def _stream(load: _Load, rows: np.ndarray, workers: int) -> Iterator[Batch]:
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


def _batches(source, positions, seed, workers, damage) -> Iterator[tuple[np.ndarray, ...]]:
    """Images, labels and whether they are the wanted ones, in the shape of each of `positions`.

    `seed` None: of the test split.
    """
    if source.augmentation != "resized_crop":
        images, labels = source.arrays()
        for row in positions:
            indices = row if seed is None else example_indices(seed, len(source), row)
            yield (
                np.take(images, indices, axis=0),
                np.take(labels, indices),
                ~np.isin(indices, getattr(source, "unreadable", ())),
            )
        return
    rows = np.stack([row.ravel() for row in positions])
    shape = next(iter(positions)).shape
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


class _Positions:
    """Global positions of the steps from `start` to `stop`, a row a step, made when asked for."""

    def __init__(self, start: int, stop: int, batch_size: int, offsets: np.ndarray):
        self.steps, self.batch_size, self.offsets = range(start, stop), batch_size, offsets

    def __iter__(self):
        return (step * self.batch_size + self.offsets for step in self.steps)


def train_batches(
    source,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    stop_step: int,
    num_devices: int,
    device_slice: tuple[int, int] | None = None,
    accumulate_steps: int = 1,
    workers: int = 0,
    damage: Damage | None = None,
) -> Iterator[Batch]:
    """Training batches of the steps `start_step` to before `stop_step`, this process's share.

    Within a global batch of k micro-batches over D devices, example i of micro-batch j on device d
    has position `(j * D + d) * b + i`, with `b = batch_size / (D * k)`.

    Args:
      source: a training split.
      batch_size: over all devices.
      seed: of order and crops.
      start_step: first step.
      stop_step: the step after the last.
      num_devices: D, over all processes.
      device_slice: first device of this process and the one after its last; all of them if None.
      accumulate_steps: k.
      workers: processes that decode; 0 decodes in threads of this one.
      damage: counts examples that cannot be read, in whose place the next ones stand; None for
        none allowed.
    Yields:
      `{"image": uint8 [devices, k, b, height, width, channels], "label": int32 [devices, k, b]}`.
    Raises:
      UserError: if the batch does not divide, or too many examples cannot be read.
    """
    damage = damage or Damage()
    if batch_size % (num_devices * accumulate_steps):
        raise UserError(
            f"{batch_size=} does not divide among {num_devices} devices and {accumulate_steps}"
            " micro-batches"
        )
    offsets = np.arange(batch_size).reshape(accumulate_steps, num_devices, -1).swapaxes(0, 1)
    offsets = offsets[slice(*device_slice or (0, num_devices))]
    if source.augmentation == "resized_crop":
        # Grain wants all positions of its stream: an epoch or so at a time keeps them few.
        chunk = max(1, 2**20 // batch_size)
        for first in range(start_step, stop_step, chunk):
            positions = _Positions(first, min(stop_step, first + chunk), batch_size, offsets)
            for image, label, _ in _batches(source, positions, seed, workers, damage):
                yield {"image": image, "label": label}
        return
    positions = _Positions(start_step, stop_step, batch_size, offsets)
    for image, label, _ in _batches(source, positions, seed, workers, damage):
        yield {"image": image, "label": label}


def eval_batches(
    source,
    *,
    batch_size: int,
    num_devices: int,
    device_slice: tuple[int, int] | None = None,
    workers: int = 0,
    damage: Damage | None = None,
) -> Iterator[Batch]:
    """Batches that hold each example of `source` once, over all processes together.

    Args:
      source: a test split.
      batch_size: over all devices, rounded up to a multiple of `num_devices`.
      num_devices: over all processes.
      device_slice: as in `train_batches`.
      workers: as in `train_batches`.
      damage: counts examples that cannot be read, which are left out; None for none allowed.
    Yields:
      `{"image": uint8 [devices, b, height, width, channels], "label": int32 [devices, b], "mask":
      float32 [devices, b]}`; where the mask is 0, another example stands in.
    """
    count, per_device = len(source), -(-batch_size // num_devices)
    batches = -(-count // (per_device * num_devices))
    everything = np.arange(batches * per_device * num_devices)
    everything = everything.reshape(batches, num_devices, per_device)
    positions = everything[:, slice(*device_slice or (0, num_devices))]
    mask = positions < count
    indices = np.where(mask, positions, 0)
    found = _batches(source, indices, None, workers, damage or Damage())
    for valid, (image, label, readable) in zip(mask, found, strict=True):
        yield {"image": image, "label": label, "mask": (valid & readable).astype(np.float32)}


def take(source, indices: np.ndarray, damage: Damage | None = None) -> tuple[np.ndarray, ...]:
    """Examples at `indices` of `[n]`, not augmented.

    Returns:
      Images, uint8 `[n, height, width, channels]`, and labels, int32 `[n]`.
    """
    return next(_batches(source, indices[None], None, 0, damage or Damage()))[:2]
