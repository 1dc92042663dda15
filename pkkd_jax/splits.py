"""Both splits of a data set, cut into batches for all devices."""

import dataclasses

import jax

from pkkd_jax import data


@dataclasses.dataclass(frozen=True)
class Splits:
    """Both splits of a data set, and how they are cut into batches.

    Attributes:
      train: images to learn from, and to recalibrate BatchNorm with.
      test: images to evaluate on.
      judge: what they are, "test" or "validation", the first word of their figures.
      batch_size: over all devices.
      seed: of the order of training images and of their crops.
      workers: processes that decode images.
      damage: counts examples that cannot be read.
    """

    train: data.Source
    test: data.Source
    judge: str
    batch_size: int
    seed: int
    workers: int
    damage: data.Damage

    @property
    def augmentation(self) -> dict:
        """Keywords of `data.augment` for the training images."""
        source = self.train
        return {"augmentation": source.augmentation, "mean": source.mean, "std": source.std}

    def train_batches(self, start: int, stop: int, accumulate_steps: int = 1):
        """Training batches of the steps from `start` to before `stop`."""
        return data.train_batches(
            self.train,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=start,
            stop_step=stop,
            num_devices=jax.device_count(),
            device_slice=_local_devices(),
            accumulate_steps=accumulate_steps,
            workers=self.workers,
            damage=self.damage,
        )

    def test_batches(self):
        """All test images, each once."""
        return data.eval_batches(
            self.test,
            batch_size=self.batch_size,
            num_devices=jax.device_count(),
            device_slice=_local_devices(),
            workers=self.workers,
            damage=self.damage,
        )


def _local_devices() -> tuple[int, int]:
    count = jax.local_device_count()
    return jax.process_index() * count, (jax.process_index() + 1) * count
