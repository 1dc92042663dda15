"""Augmentation on the device, inside the jitted update."""

import jax
import jax.numpy as jnp
from jax import lax

AUGMENTATIONS = ("none", "crop_flip", "resized_crop")
PADDING = 4


def normalise(images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`(images - mean) / std` in float32; mean and std of 255, a number a channel."""
    return (images.astype(jnp.float32) - jnp.array(mean)) / jnp.array(std)


def _crop(image: jax.Array, offset: jax.Array) -> jax.Array:
    padded = jnp.pad(image, ((PADDING, PADDING), (PADDING, PADDING), (0, 0)))
    return lax.dynamic_slice(padded, (offset[0], offset[1], 0), image.shape)


def augment(
    key: jax.Array,
    images: jax.Array,
    positions: jax.Array,
    *,
    augmentation: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> jax.Array:
    """Random crops and flips, then normalisation.

    An example's randomness depends on `key` and its position only, so that it is the same however
    the batch is split over devices.

    Args:
      key: of this step.
      images: uint8 `[batch, height, width, channels]`.
      positions: int32 `[batch]`, each example's place in the global batch.
      augmentation: "crop_flip" pads 4 black pixels a side, crops back and flips half of the images;
        "resized_crop" flips only, the host has cropped; "none".
      mean: of each channel, of 255.
      std: likewise.
    Returns:
      float32, of the shape of `images`.
    """
    if augmentation != "none":
        keys = jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)
        # One draw of three numbers an example: row, column, flip.
        draws = jax.vmap(lambda k: jax.random.randint(k, (3,), 0, 2 * (2 * PADDING + 1)))(keys)
        if augmentation == "crop_flip":
            images = jax.vmap(_crop)(images, draws[:, :2] % (2 * PADDING + 1))
        flip = (draws[:, 2] % 2 == 1)[:, None, None, None]
        images = jnp.where(flip, images[:, :, ::-1], images)
    return normalise(images, mean, std)
