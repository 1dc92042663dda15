"""Similarity-preserving distillation: which examples of a batch excite a network alike."""

import jax.numpy as jnp

from pkkd_jax.distill import Distiller, rows, unit
from pkkd_jax.distill.taps import pair_taps

__all__ = ["similarity_preserving"]


def similarity_preserving(taps: str = "stage_outputs") -> Distiller:
    """Squared difference of the batch's similarity matrices.

        loss = sum over taps of 1/b^2 ||G_T - G_S||_F^2,
        G = Q Q^T with every row divided by its length,   Q: [b, height * width * channels]

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; nothing but the examples must agree.
    Returns:
      A `Distiller` without parameters; its metric is `loss_sp`.
    Raises:
      UserError: when applied, for taps that are not there.
    References:
      Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, Eqs. 1-4.
    """

    def similarities(features, axis_name):
        everyone = rows(features, axis_name)
        return unit(everyone @ everyone.T)

    def apply(params, student, teacher, axis_name):
        del params
        losses = [
            jnp.square(
                similarities(pair.teacher, axis_name) - similarities(pair.student, axis_name)
            ).mean()
            for pair in pair_taps("similarity_preserving", student, teacher, taps)
        ]
        loss = jnp.stack(losses).sum()
        return loss, {"loss_sp": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
