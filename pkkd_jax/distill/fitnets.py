"""FitNets: a regressor maps the student's features to the teacher's."""

import jax
import jax.numpy as jnp

from pkkd_jax.distill import Distiller
from pkkd_jax.distill.taps import pair_taps

__all__ = ["fitnets"]


def fitnets(taps: str = "stage_outputs") -> Distiller:
    """Hint-based training: squared difference of regressed and wanted features.

        loss = mean over taps of mean((r(student) - teacher)^2),   r: a 1x1 convolution with bias

    The paper trains up to the hint first and everything after; here both losses act together, as
    its successors compare it.

    It grows with the square of the teacher's features, which weight decay makes smaller along a
    training: a weight is good beside teachers that were trained as long.

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; height and width of a pair must agree.
    Returns:
      A `Distiller` whose parameters are the regressors; its metric is `loss_fitnets`.
    Raises:
      UserError: when applied, for taps that do not fit together.
    References:
      Romero et al., FitNets, ICLR 2015, Eq. 3; the regressor is 1x1 for features of one size.
    """

    def pairs(student, teacher):
        return pair_taps("fitnets", student, teacher, taps, same="size")

    def init(key, student, teacher):
        found = pairs(student, teacher)
        params = {}
        for pair_key, pair in zip(jax.random.split(key, len(found)), found, strict=True):
            shape = pair.student.shape[-1], pair.teacher.shape[-1]
            kernel = jax.nn.initializers.lecun_normal()(pair_key, shape, jnp.float32)
            params[pair.name] = {"kernel": kernel, "bias": jnp.zeros(shape[1])}
        return params

    def apply(params, student, teacher, axis_name):
        del axis_name
        losses = []
        for pair in pairs(student, teacher):
            regressor = params[pair.name]
            regressed = pair.student.astype(jnp.float32) @ regressor["kernel"] + regressor["bias"]
            losses.append(jnp.square(regressed - pair.teacher.astype(jnp.float32)).mean())
        loss = jnp.stack(losses).mean()
        return loss, {"loss_fitnets": loss}

    return Distiller(init, apply)
