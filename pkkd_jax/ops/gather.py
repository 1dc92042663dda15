"""Forward and input gradient as one operation, which an accelerator's kernel computes.

It gathers, for each place of its result, what the taps bring:

    y[n,i,j,c] = sum_{u,v,k} term(v[n, i*s + u*d, j*s + v*d, k], w[u,v,k,c])

Forward the term is `-|v - w|`. In the input gradient `v` is dy, padded, `w` the filters in reverse,
and the term is `v * clip(w - x, -1, 1)` or `v * sign(w - x)` with the input `x` of that place.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pkkd_jax.ops import portable
from pkkd_jax.ops.geometry import Geometry

# `(v, w, x, strides, dilation, size, surrogate) -> y`: `v` is `[batch, height, width, k]` and holds
# every place that is seen, `w` `[kh, kw, k, c]`; `x` is `[batch, *size, c]`, or None forward; `y`
# is `[batch, *size, c]`, float32. All three are of one dtype.
Gather = Callable[..., jax.Array]


def empty(*arrays: jax.Array) -> bool:
    """Whether one of them has no elements."""
    return any(0 in array.shape for array in arrays)


def forward(x: jax.Array, w: jax.Array, geometry: Geometry, gather: Gather) -> jax.Array:
    """`portable.forward` by `gather`; the operands have elements and one group."""
    size = geometry.output_shape(x.shape, w.shape)[1:3]
    x = portable.pad_or_crop(x, *geometry.padding)
    return gather(x, w, None, geometry.strides, geometry.dilation, size, "")


def input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry, gather: Gather
) -> jax.Array:
    """`portable.input_gradient` by `gather`; the operands have elements and one group."""
    if geometry.input_gradient == "full":  # linear: sum dy * w - x * sum dy
        ones = jnp.ones((*w.shape[:2], 1, w.shape[3]), w.dtype)
        products, sums = (
            portable.product_input_gradient(
                kernel, dy, geometry, "highest", (*x.shape[:3], kernel.shape[2])
            )
            for kernel in (w, ones)
        )
        return products - x * sums

    def gradient(place, padded, us, vs, rows, columns):
        # The last tap sees the first pixels: in reverse, it is a convolution of dy.
        # Tap by tap: a strided slice of filters stopped a compiler for TPUs.
        taps = jnp.stack([jnp.stack([w[u, v].T for v in reversed(vs)]) for u in reversed(us)])
        padded = padded[:, rows[-1] :, columns[-1] :]
        dilation = _step(rows[::-1]), _step(columns[::-1])
        size = place.shape[1:3]
        return gather(padded, taps, place, (1, 1), dilation, size, geometry.input_gradient)

    return portable.by_phase(x, w.shape[:2], dy, geometry, gradient)


def _step(numbers: list[int]) -> int:
    return numbers[1] - numbers[0] if len(numbers) > 1 else 1
