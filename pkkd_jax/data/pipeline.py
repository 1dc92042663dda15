"""The host's side: which example stands where in which batch, and its uint8 pixels.

Everything is a function of seed, step and global position: there is nothing to save.
"""

import functools
import math
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


class InMemory:
    """All images of a source in one array, for sets whose images have one size."""

    def __init__(self, source):
        if hasattr(source, "arrays"):
            self.images, self.labels = source.arrays()
        else:
            examples = [source[i] for i in range(len(source))]
            self.images = np.stack([e["image"] for e in examples])
            self.labels = np.array([e["label"] for e in examples], np.int32)

    def gather(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 images and int32 labels, of the shape of `indices` and the rest."""
        return np.take(self.images, indices, axis=0), np.take(self.labels, indices)


@functools.lru_cache(maxsize=4)
def _in_memory(source) -> InMemory:
    return InMemory(source)


def resized_crop(image: Image.Image, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A random part of `image` (8 to 100% of its area, ratio 3/4 to 4/3), resized to `size`."""
    width, height = image.size
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * width * height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            break
    else:  # an image too long for any such part: its centre
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


def centre_crop(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """The middle of `image`: its shorter side is resized to 256/224 of `size` first."""
    width, height = image.size
    # The same pixels as a resize and then a crop, in one pass.
    scale = min(width / size[1], height / size[0]) * 224 / 256
    w, h = size[1] * scale, size[0] * scale
    left, top = (width - w) / 2, (height - h) / 2
    box = (left, top, left + w, top + h)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR, box=box))


class _Load:
    """Position in the training stream, or index of a test image, to pixels and label."""

    def __init__(self, source, seed: int | None):
        self.source, self.seed = source, seed

    def __call__(self, position: int) -> dict[str, np.ndarray]:
        position, size = int(position), self.source.image_shape[:2]
        index = position
        if self.seed is not None:
            index = int(example_indices(self.seed, len(self.source), np.array([position]))[0])
        try:
            example = self.source[index]
            image = example["image"]
            if not isinstance(image, Image.Image):
                image = Image.fromarray(image)
            if self.seed is None:
                pixels = centre_crop(image, size)
            else:
                rng = np.random.default_rng((self.seed, 1, position))
                pixels = resized_crop(image, size, rng)
        except OSError as error:
            raise UserError(
                f"example {index} of the data set cannot be decoded: {error}; mend or remove it"
            ) from error
        return {"image": pixels, "label": np.int32(example["label"])}


def _stream(load: _Load, positions: np.ndarray, workers: int) -> Iterator[Batch]:
    """Batches of decoded images for `positions` of `[batches, batch]`, read ahead by Grain."""
    import grain

    flat = positions.ravel()
    dataset = grain.MapDataset.source(flat).map(load).batch(positions.shape[1])
    threads = grain.ReadOptions(num_threads=0 if workers else 16, prefetch_buffer_size=64)
    iterable = dataset.to_iter_dataset(threads)
    if workers:
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(iterable)


def _batches(source, positions, seed, workers) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images and labels in the shape of each row of `positions`; `seed` None: of the test split."""
    if source.augmentation != "resized_crop":
        memory = _in_memory(source)
        for row in positions:
            indices = row if seed is None else example_indices(seed, len(source), row)
            yield memory.gather(indices)
        return
    flat = np.stack([row.ravel() for row in positions])
    shape = next(iter(positions)).shape
    for batch in _stream(_Load(source, seed), flat, workers):
        yield (
            batch["image"].reshape(*shape, *batch["image"].shape[1:]),
            batch["label"].reshape(shape),
        )


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
    Yields:
      `{"image": uint8 [devices, k, b, height, width, channels], "label": int32 [devices, k, b]}`.
    Raises:
      UserError: if the batch does not divide, or an image cannot be decoded.
    """
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
            for image, label in _batches(source, positions, seed, workers):
                yield {"image": image, "label": label}
        return
    positions = _Positions(start_step, stop_step, batch_size, offsets)
    for image, label in _batches(source, positions, seed, workers):
        yield {"image": image, "label": label}


def eval_batches(
    source,
    *,
    batch_size: int,
    num_devices: int,
    device_slice: tuple[int, int] | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches that hold each example of `source` once, over all processes together.

    Args:
      source: a test split.
      batch_size: over all devices, rounded up to a multiple of `num_devices`.
      num_devices: over all processes.
      device_slice: as in `train_batches`.
      workers: as in `train_batches`.
    Yields:
      `{"image": uint8 [devices, b, height, width, channels], "label": int32 [devices, b], "mask":
      float32 [devices, b]}`; where the mask is 0, example 0 fills the last batch up.
    """
    count, per_device = len(source), -(-batch_size // num_devices)
    batches = -(-count // (per_device * num_devices))
    everything = np.arange(batches * per_device * num_devices)
    everything = everything.reshape(batches, num_devices, per_device)
    positions = everything[:, slice(*device_slice or (0, num_devices))]
    mask = positions < count
    indices = np.where(mask, positions, 0)
    for valid, (image, label) in zip(mask, _batches(source, indices, None, workers), strict=True):
        yield {"image": image, "label": label, "mask": valid.astype(np.float32)}


def first_examples(source, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Training images 0 to `count - 1`, uint8 `[count, height, width, channels]`, and labels."""
    if source.augmentation != "resized_crop":
        return _in_memory(source).gather(np.arange(count))
    load = _Load(source, None)
    examples = [load(i) for i in range(count)]
    return np.stack([e["image"] for e in examples]), np.array([e["label"] for e in examples])
