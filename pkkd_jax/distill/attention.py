"""Attention transfer: where a network looks, without saying in which channel."""

import jax
import jax.numpy as jnp

from pkkd_jax.distill import Distiller, unit
from pkkd_jax.distill.taps import pair_taps

__all__ = ["attention_transfer"]


def attention_map(features: jax.Array) -> jax.Array:
    """`[batch, height * width]`: `sum_c features^2`, of length 1 for each example."""
    return unit(jnp.square(features.astype(jnp.float32)).sum(-1).reshape(len(features), -1))


def attention_transfer(taps: str = "stage_outputs") -> Distiller:
    """Squared distance of normalised attention maps.

        loss = 1/2 sum over taps of mean over examples of ||Q_S / ||Q_S|| - Q_T / ||Q_T|| ||^2,
        Q = sum over channels of features^2, as a vector over places

    The paper's equation has the distance itself; squared it is as in the authors' code, which takes
    the mean over places and no half: a weight of 1000 there is 2000 / places here.

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; height and width of a pair must agree.
    Returns:
      A `Distiller` without parameters; its metric is `loss_at`.
    Raises:
      UserError: when applied, for taps that do not fit together.
    References:
      Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, Eq. 2.
    """

    def apply(params, student, teacher, axis_name):
        del params, axis_name
        losses = [
            jnp.square(attention_map(pair.student) - attention_map(pair.teacher)).sum(-1).mean()
            for pair in pair_taps("attention_transfer", student, teacher, taps, same="size")
        ]
        loss = jnp.stack(losses).sum() / 2
        return loss, {"loss_at": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
