"""Probabilistic knowledge transfer: how likely two examples are neighbours."""

import jax.numpy as jnp

from pkkd_jax.distill import Distiller, rows, unit
from pkkd_jax.distill.taps import pair_taps

__all__ = ["pkt"]


def pkt(taps: str = "penultimate") -> Distiller:
    """Divergence between the two networks' neighbourhoods of each example.

        loss = mean over taps and examples j of sum_{i != j} p_ij log(p_ij / q_ij),
        p_ij = K(t_i, t_j) / sum_{k != j} K(t_k, t_j),   K(a, b) = (cos(a, b) + 1) / 2

    with p of the teacher and q, likewise, of the student. The paper sums over examples; the mean
    does not depend on the batch's size.

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; nothing but the examples must agree.
    Returns:
      A `Distiller` without parameters; its metric is `loss_pkt`.
    Raises:
      UserError: when applied, for taps that are not there.
    References:
      Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV
      2018, Eqs. 3-7.
    """

    def neighbours(features, axis_name):
        x = unit(rows(features, axis_name))
        others = ~jnp.eye(len(x), dtype=bool)
        kernel = jnp.where(others, jnp.maximum(x @ x.T + 1, 0.0) / 2, 0.0)
        return kernel / kernel.sum(-1, keepdims=True), others

    def divergence(pair, axis_name):
        p, others = neighbours(pair.teacher, axis_name)
        q, _ = neighbours(pair.student, axis_name)
        terms = jnp.where(others, p * (jnp.log(p + 1e-12) - jnp.log(q + 1e-12)), 0.0)
        return terms.sum(-1).mean()

    def apply(params, student, teacher, axis_name):
        del params
        pairs = pair_taps("pkt", student, teacher, taps)
        loss = jnp.stack([divergence(pair, axis_name) for pair in pairs]).mean()
        return loss, {"loss_pkt": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
