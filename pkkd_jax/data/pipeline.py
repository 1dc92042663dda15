"""The host's side: which example stands where in which batch, and its uint8 pixels.

Everything is a function of seed, step and global position: there is nothing to save.
"""

from collections.abc import Iterator

import numpy as np

from pkkd_jax.data import photographs
from pkkd_jax.data.order import example_indices
from pkkd_jax.data.reading import Damage
from pkkd_jax.names import UserError

Batch = dict[str, np.ndarray]


def _batches(source, positions, seed, workers, damage) -> Iterator[tuple[np.ndarray, ...]]:
    """Images, labels and whether they are the wanted ones, in the shape of each of `positions`.

    `seed` None: of the test split.
    """
    if source.augmentation == "resized_crop":
        yield from photographs.batches(source, positions, seed, workers, damage)
        return
    images, labels = source.arrays()
    for row in positions:
        indices = row if seed is None else example_indices(seed, len(source), row)
        yield (
            np.take(images, indices, axis=0),
            np.take(labels, indices),
            ~np.isin(indices, getattr(source, "unreadable", ())),
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
