"""One-bit convolutions: signs of activations and filters, with surrogate gradients."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen
from jax import Array

from pkkd_jax.ops.conv import conv_general_dilated, define_forward

# Products of signs are XNORs, which a trace could not see in an ordinary convolution.
forward_p = define_forward("binary_forward")


@jax.custom_jvp
def sign(x: Array) -> Array:
    """1 where `x >= 0`, else -1; its gradient is passed straight through where `|x| <= 1`.

    References:
      Hubara et al., Binarized Neural Networks, NeurIPS 2016, Eq. 4.
    """
    # NaN stays NaN: an update must not look finite where its activations are not.
    return jnp.where(x >= 0, 1, jnp.where(x < 0, -1, x)).astype(x.dtype)


@sign.defjvp
def _sign_jvp(primals, tangents):
    return sign(*primals), jax.jvp(lambda x: jnp.clip(x, -1, 1), primals, tangents)[1]


def binary_conv(x: Array, w: Array, *arguments, **keywords) -> Array:
    """`lax.conv_general_dilated` of signs, every filter scaled by its mean magnitude.

        y = (sign(x) * sign(w)) a,   a[o] = mean over u, v, c of |w[u, v, c, o]|

    A padded place is 0, and adds nothing. Arguments are those of `conv.conv_general_dilated`; where
    that has a primitive of its own, "binary_forward" stands in a trace.

    References:
      Rastegari et al., XNOR-Net, ECCV 2016, Eqs. 6-9, without the scale of the activations.
    """
    scale = jnp.abs(w).mean((0, 1, 2))
    return conv_general_dilated(
        sign(x), sign(w) * scale, *arguments, primitive=forward_p, **keywords
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def project(w: Array, projection: Array, weight: float, rate: float) -> Array:
    """The nearest one-bit filters: `a sign(p w)`, a the mean `|w|`, p the projection's mean.

    The gradient of what follows, d, and that of the projection loss
    `weight / 2 ||projection (w + rate d) - result||^2` reach both arguments:

        dw = (d 1[|projection w| <= 1] + missed) projection
        dprojection = sum over channels and filters of d 1[|projection w| <= 1] w + missed w
                      + weight (projection w - result) rate d
        missed = weight (projection (w + rate d) - result)

    without the paper's term in d^2: so the mean over devices is that of the global batch.

    Args:
      w: `[kh, kw, c_in, c_out]`.
      projection: `[kh, kw]`, the same for every channel and filter.
      weight: of the projection loss.
      rate: at which d moves `w` in it.
    References:
      Gu et al., Projection Convolutional Neural Networks for 1-bit CNNs, AAAI 2019, one projection.
    """
    signs = jnp.where(projection.mean() * w >= 0, 1, -1)
    return (jnp.abs(w).mean() * signs).astype(w.dtype)


def _project_fwd(w, projection, weight, rate):
    result = project(w, projection, weight, rate)
    return result, (w, projection, result)


def _project_bwd(weight, rate, residuals, d):
    w, projection, result = residuals
    p = projection[:, :, None, None]
    passed = d * (jnp.abs(p * w) <= 1)
    still = weight * (p * w - result)
    missed = still + weight * p * rate * d
    return (passed + missed) * p, ((passed + missed) * w + still * rate * d).sum((2, 3))


project.defvjp(_project_fwd, _project_bwd)


class ProjectionConv(linen.Module):
    """`lax.conv_general_dilated` of signs and projected filters, see `project`.

    Attributes:
      weight: of the projection loss.
      rate: at which the gradient moves the filters in it.
    """

    weight: float = 1e-4
    rate: float = 0.1

    @linen.compact
    def __call__(self, x: Array, w: Array, *arguments, **keywords) -> Array:
        ones = linen.initializers.ones_init()
        projection = self.param("projection", ones, w.shape[:2])
        projected = project(w, projection.astype(w.dtype), self.weight, self.rate)
        return conv_general_dilated(sign(x), projected, *arguments, primitive=forward_p, **keywords)
