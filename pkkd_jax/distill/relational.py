"""Relational distillation: distances and angles between examples."""

import jax
import jax.numpy as jnp
import optax

from pkkd_jax.distill import Distiller, gather
from pkkd_jax.distill.taps import pair_taps

__all__ = ["relational"]


def distances(x: jax.Array) -> jax.Array:
    """`[b, b]`: Euclidean distances of the rows of `x`, divided by the mean over distinct pairs."""
    squares = jnp.square(x[:, None] - x[None]).sum(-1)
    apart = squares > 0
    found = jnp.where(apart, jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    count = len(x) * (len(x) - 1)
    return found / jnp.maximum(found.sum() / count, 1e-12)


def angles(x: jax.Array) -> jax.Array:
    """`[b, b, b]`: at `[j, i, k]` the cosine of the angle at `x_j` between `x_i` and `x_k`."""
    towards = x[None] - x[:, None]
    squares = jnp.square(towards).sum(-1, keepdims=True)
    apart = squares > 0
    unit = jnp.where(apart, towards / jnp.sqrt(jnp.where(apart, squares, 1.0)), 0.0)
    return jnp.einsum("jic,jkc->jik", unit, unit)


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
      UserError: when applied, for taps that are not there.
    References:
      Park et al., Relational Knowledge Distillation, CVPR 2019, Eqs. 6-11.
    """

    def compare(measure, teacher, student, count):
        # Where two of the examples are one, both sides are equal and add nothing.
        return optax.losses.huber_loss(measure(student), measure(teacher)).sum() / count

    def apply(params, student, teacher, axis_name):
        del params
        by_distance, by_angle = [], []
        for pair in pair_taps("relational", student, teacher, taps):
            both = [
                gather(features.astype(jnp.float32).reshape(len(features), -1), axis_name)
                for features in (pair.teacher, pair.student)
            ]
            b = len(both[0])
            by_distance.append(compare(distances, *both, b * (b - 1)))
            by_angle.append(compare(angles, *both, b * (b - 1) * (b - 2)))
        distance, angle = jnp.stack(by_distance).mean(), jnp.stack(by_angle).mean()
        loss = distance_weight * distance + angle_weight * angle
        return loss, {"loss_rkd_distance": distance, "loss_rkd_angle": angle}

    return Distiller(lambda key, student, teacher: {}, apply)
