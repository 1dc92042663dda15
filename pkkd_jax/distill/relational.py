"""Relational distillation: distances and angles between examples."""

import jax
import jax.numpy as jnp
import optax

from pkkd_jax.distill import Distiller, rows
from pkkd_jax.distill.taps import pair_taps
from pkkd_jax.names import UserError

__all__ = ["relational"]


def measures(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Distances of the rows of `x`, and cosines of the angles that three of them make.

    Returns:
      `[b, b]`, divided by the mean over distinct pairs; and `[b, b, b]`, at `[j, i, k]` the angle
      at `x_j` between `x_i` and `x_k`. Both are 0 where rows coincide, and so are their gradients.
    """
    x = x - x.mean(0)
    products = jnp.matmul(x, x.T, precision="highest")
    own = jnp.diag(products)
    squares = own[:, None] + own[None] - 2 * products
    apart = ~jnp.eye(len(x), dtype=bool) & (squares > 1e-6 * own.mean())
    found = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    inverse = jnp.where(apart, 1 / jnp.where(apart, found, 1.0), 0.0)
    # (x_i - x_j) . (x_k - x_j), which needs no [b, b, features].
    inner = products[None] - products[:, :, None] - products[:, None, :] + own[:, None, None]
    mean = found.sum() / (len(x) * (len(x) - 1))
    return found / jnp.maximum(mean, 1e-12), inner * inverse[:, :, None] * inverse[:, None, :]


def relational(
    taps: str = "penultimate", distance_weight: float = 25.0, angle_weight: float = 50.0
) -> Distiller:
    """Matches the mutual distances and angles of a batch's features.

        loss = mean over taps of distance_weight * mean over pairs of H(d_S - d_T)
                               + angle_weight * mean over triples of H(cos_S - cos_T)

    d is the distance of two examples divided by the batch's mean, cos the cosine of the angle that
    three of them make, and H Huber's loss with delta 1; pairs and triples are of distinct examples.
    The batch of all devices makes b^3 angles: at b = 256, 64 MB a matrix.

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; nothing but the examples must agree.
      distance_weight: 25 in the paper's classification.
      angle_weight: 50 in the paper's classification.
    Returns:
      A `Distiller` without parameters; its metrics are `loss_rkd_distance` and `loss_rkd_angle`,
      without their weights.
    Raises:
      UserError: when applied, for taps that are not there, or fewer than three examples.
    References:
      Park et al., Relational Knowledge Distillation, CVPR 2019, Eqs. 6-11.
    """

    def apply(params, student, teacher, axis_name):
        del params
        by_distance, by_angle = [], []
        for pair in pair_taps("relational", student, teacher, taps):
            ours, theirs = (measures(rows(x, axis_name)) for x in (pair.student, pair.teacher))
            b = len(ours[0])
            if b < 3:
                raise UserError(
                    f"loss 'relational' compares triples of examples, and a batch has {b}: choose"
                    " a larger config.batch_size or fewer config.accumulate_steps"
                )
            # Where two of a triple are one, both sides are equal and add nothing.
            huber = [optax.losses.huber_loss(x, y).sum() for x, y in zip(ours, theirs, strict=True)]
            by_distance.append(huber[0] / (b * (b - 1)))
            by_angle.append(huber[1] / (b * (b - 1) * (b - 2)))
        distance, angle = jnp.stack(by_distance).mean(), jnp.stack(by_angle).mean()
        loss = distance_weight * distance + angle_weight * angle
        return loss, {"loss_rkd_distance": distance, "loss_rkd_angle": angle}

    return Distiller(lambda key, student, teacher: {}, apply)
