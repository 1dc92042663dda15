"""Correlation congruence: how examples correlate in a kernel space."""

import math

import jax
import jax.numpy as jnp

from pkkd_jax.distill import Distiller, rows, unit
from pkkd_jax.distill.taps import pair_taps
from pkkd_jax.names import UserError

__all__ = ["correlation_congruence"]


def correlations(x: jax.Array, gamma: float, order: int) -> jax.Array:
    """`[b, b]`: the Gaussian kernel of the rows of `x`, brought to length 1, by its series."""
    cosines = unit(x) @ unit(x).T
    series = sum((2 * gamma) ** p / math.factorial(p) * cosines**p for p in range(order + 1))
    return math.exp(-2 * gamma) * series


def correlation_congruence(
    taps: str = "penultimate", gamma: float = 0.4, order: int = 2
) -> Distiller:
    """Squared difference of the two networks' correlation matrices of a batch.

        loss = mean over taps of 1/b^2 ||C_S - C_T||_F^2,
        C_ij = exp(-2 gamma) sum_{p = 0}^{order} (2 gamma)^p / p! cos(x_i, x_j)^p

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; nothing but the examples must agree.
      gamma: of the Gaussian kernel, above 0.
      order: of its Taylor series, 1 or more.
    Returns:
      A `Distiller` without parameters; its metric is `loss_cc`.
    Raises:
      UserError: for arguments out of range; when applied, for taps that are not there.
    References:
      Peng et al., Correlation Congruence for Knowledge Distillation, ICCV 2019, Eqs. 5-10.
    """
    if not gamma > 0 or order < 1:
        raise UserError(
            f"{gamma=}, {order=} of loss 'correlation_congruence': gamma must be above 0 and order"
            " 1 or more, for example 0.4 and 2"
        )

    def of(features, axis_name):
        return correlations(rows(features, axis_name), gamma, order)

    def apply(params, student, teacher, axis_name):
        del params
        losses = [
            jnp.square(of(pair.student, axis_name) - of(pair.teacher, axis_name)).mean()
            for pair in pair_taps("correlation_congruence", student, teacher, taps)
        ]
        loss = jnp.stack(losses).mean()
        return loss, {"loss_cc": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
