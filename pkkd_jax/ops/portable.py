"""Adder convolution in plain JAX: serves every platform, exports everywhere, and is the oracle.

Each rule is a loop over (tap of the filter, block of channels) whose body unrolls the channels of
the block. XLA fuses and vectorises such a body, and nothing larger than input plus output lives at
once. All three accumulate in float32.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pkkd_jax.ops.geometry import DIMENSIONS, Geometry, Pair, varying_axes

# Channels in one loop body: 16 was the fastest of 4 to 32 on AVX-512.
BLOCK = 16

SURROGATES = {
    "hardtanh": lambda difference: jnp.clip(difference, -1, 1),
    "sign": jnp.sign,
    "full": lambda difference: difference,
}


def _pad_to_blocks(array: jax.Array, axis: int) -> tuple[jax.Array, int, int]:
    """Pads `axis` with zeros to whole blocks; returns the array, the block and their number."""
    size = array.shape[axis]
    block = min(BLOCK, size)
    count = -(-size // block)
    pads = [(0, 0)] * array.ndim
    pads[axis] = (0, count * block - size)
    return jnp.pad(array, pads), block, count


def pad_or_crop(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, ((0, 0, 0), (*rows, 0), (*columns, 0), *((0, 0, 0),) * (x.ndim - 3)))


def _accumulate(trips: int, body, like: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Sums what `body` adds to zeros of `shape`, `trips` times."""
    return lax.fori_loop(0, trips, body, _zeros(shape, jnp.float32, like))


def _zeros(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.Array:
    """Zeros that vary over the same mesh axes as `like`."""
    zeros = jnp.zeros(shape, dtype)
    axes = tuple(varying_axes(like))
    return lax.pcast(zeros, axes, to="varying") if axes else zeros


def forward(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """`y[n,i,j,o] = -sum |x - w|`, see `adder.adder_conv`."""
    groups, (sh, sw), (dh, dw) = geometry.groups, geometry.strides, geometry.dilation
    n, ho, wo, c_out = geometry.output_shape(x.shape, w.shape)
    if 0 in (n, ho, wo, c_out, w.shape[2]):
        return jnp.zeros((n, ho, wo, c_out), x.dtype)
    kh, kw, c_group, _ = w.shape
    x = pad_or_crop(x.astype(jnp.float32), *geometry.padding)
    # Channels padded with zeros in both operands add |0 - 0|: nothing.
    x, block, blocks = _pad_to_blocks(x.reshape(*x.shape[:3], groups, c_group), 4)
    w = w.astype(jnp.float32).reshape(kh * kw, c_group, groups, c_out // groups)
    w, _, _ = _pad_to_blocks(w, 1)
    span = (n, (ho - 1) * sh + 1, (wo - 1) * sw + 1, groups, block)

    def body(trip, y):
        tap, start = trip // blocks, trip % blocks * block
        corner = (0, tap // kw * dh, tap % kw * dw, 0, start)
        window = lax.dynamic_slice(x, corner, span)[:, ::sh, ::sw]
        taps = lax.dynamic_slice(w, (tap, start, 0, 0), (1, block, *w.shape[2:]))[0]
        for k in range(block):
            y = y - jnp.abs(window[..., k : k + 1] - taps[k])
        return y

    y = _accumulate(kh * kw * blocks, body, x, (n, ho, wo, groups, c_out // groups))
    return y.reshape(n, ho, wo, c_out)


def phase_taps(taps: int, phase: int, stride: int, low: int, dilation: int):
    """Taps that touch input places `phase, phase + stride, ...`, and their outputs' offsets.

    Input place `phase + k * stride` is tap `u` of the output `k + offset(u)`.
    """
    reached = [u for u in range(taps) if (phase + low - u * dilation) % stride == 0]
    return reached, [(phase + low - u * dilation) // stride for u in reached]


def by_phase(x: jax.Array, taps: Pair, dy: jax.Array, geometry: Geometry, gradient) -> jax.Array:
    """Makes an input gradient of those of the phases into which a stride splits the input.

    Args:
      x: `[batch, height, width, ...]`.
      taps: rows and columns of a filter.
      dy: `[batch, height', width', ...]`.
      geometry: of the convolution.
      gradient: `(place, padded, us, vs, rows, columns) -> gradient of place`: pixels of one phase,
        dy padded so that all that they see exists, the rows and columns of the filters that see
        them, and the corners in `padded` of what each of those brings.
    """
    (sh, sw), (height, width), (ho, wo) = geometry.strides, x.shape[1:3], dy.shape[1:3]
    rows, columns = -(-height // sh), -(-width // sw)
    x = pad_or_crop(x, (0, rows * sh - height), (0, columns * sw - width))

    def phase(i, j):
        place = x[:, i::sh, j::sw]
        us, row = phase_taps(taps[0], i, sh, geometry.padding[0][0], geometry.dilation[0])
        vs, column = phase_taps(taps[1], j, sw, geometry.padding[1][0], geometry.dilation[1])
        if not us or not vs:
            return jnp.zeros_like(place)
        top, left = max(0, -min(row)), max(0, -min(column))
        bottom, right = max(0, max(row) + rows - ho), max(0, max(column) + columns - wo)
        padded = pad_or_crop(dy, (top, bottom), (left, right))
        corners = [r + top for r in row], [c + left for c in column]
        return gradient(place, padded, us, vs, *corners)

    if (sh, sw) == (1, 1):
        return phase(0, 0)
    dx = jnp.stack([jnp.stack([phase(i, j) for j in range(sw)], 3) for i in range(sh)], 2)
    shape = (x.shape[0], rows * sh, columns * sw, *x.shape[3:])
    return dx.reshape(shape)[:, :height, :width]


def input_gradient(x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """`dx = sum over filters of dy * surrogate(w - x)`: a gather, also for strides."""
    groups = geometry.groups
    n, height, width, _ = x.shape
    kh, kw, c_group, c_out = w.shape
    if 0 in dy.shape or 0 in x.shape:
        return jnp.zeros(x.shape, x.dtype)
    surrogate = SURROGATES[geometry.input_gradient]
    xs = x.astype(jnp.float32).reshape(n, height, width, groups, c_group)
    dy = dy.astype(jnp.float32).reshape(*dy.shape[:3], groups, c_out // groups)
    dy, block, blocks = _pad_to_blocks(dy, 4)
    # [tap, c_out / groups, groups, c_in / groups]: the rows that a body reads are contiguous.
    w = w.astype(jnp.float32).reshape(kh * kw, c_group, groups, c_out // groups)
    w, _, _ = _pad_to_blocks(w.transpose(0, 3, 2, 1), 1)

    def gradient(place, padded, us, vs, rows, columns):
        # NumPy constants: a table built by jnp would be traced into the enclosing function.
        taps = np.array([u * kw + v for u in us for v in vs], np.int32)
        corners = np.array([(r, c) for r in rows for c in columns], np.int32)
        span = (n, *place.shape[1:3], groups, block)

        def body(trip, dx):
            index, start = trip // blocks, trip % blocks * block
            tap, corner = jnp.asarray(taps)[index], jnp.asarray(corners)[index]
            taps_w = lax.dynamic_slice(w, (tap, start, 0, 0), (1, block, *w.shape[2:]))[0]
            window = lax.dynamic_slice(padded, (0, corner[0], corner[1], 0, start), span)
            for k in range(block):
                dx = dx + window[..., k : k + 1] * surrogate(taps_w[k] - place)
            return dx

        return _accumulate(len(taps) * blocks, body, x, place.shape)

    return by_phase(xs, (kh, kw), dy, geometry, gradient).reshape(x.shape)


def weight_gradient(x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """`dw = sum over places of dy * (x - w)`: a convolution's gradient and a rank-one term."""
    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    return product_weight_gradient(x, dy, geometry, None, w.shape) - w * dy.sum((0, 1, 2))


def _is_matrix(geometry: Geometry, taps) -> bool:
    """Whether a convolution is one matrix product of all its pixels."""
    padding = ((0, 0), (0, 0))
    plain = (geometry.strides, geometry.padding, geometry.groups) == ((1, 1), padding, 1)
    return plain and tuple(taps) == (1, 1)


# Matrix products where they are such: XLA has better ones than convolutions, above all on GPUs.


def product_forward(x: jax.Array, w: jax.Array, geometry: Geometry, precision) -> jax.Array:
    """The ordinary convolution, which sums `x * w`; `conv.conv_general_dilated` is its face."""
    if _is_matrix(geometry, w.shape[:2]):
        return jnp.einsum("nhwi,io->nhwo", x, w[0, 0], precision=precision)
    return lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.padding,
        rhs_dilation=geometry.dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=geometry.groups,
        precision=precision,
    )


def product_input_gradient(
    w: jax.Array, dy: jax.Array, geometry: Geometry, precision, shape
) -> jax.Array:
    """`dx = sum over filters of dy * w`, of `shape`."""
    x = _zeros(shape, dy.dtype, dy)
    return jax.linear_transpose(lambda x: product_forward(x, w, geometry, precision), x)(dy)[0]


def product_weight_gradient(
    x: jax.Array, dy: jax.Array, geometry: Geometry, precision, shape
) -> jax.Array:
    """`dw = sum over places of dy * x`, of `shape`."""
    if _is_matrix(geometry, shape[:2]):
        # Image by image where that takes no more than the operands: as one product, small matrices
        # of very long sums would leave a GPU idle.
        each = "n" if x.shape[0] * math.prod(shape) <= x.size + dy.size else ""
        product = jnp.einsum(
            f"nhwi,nhwo->{each}io", x, dy, precision=precision, preferred_element_type=jnp.float32
        )
        return (product.sum(0) if each else product).reshape(shape)
    w = _zeros(shape, dy.dtype, dy)
    return jax.linear_transpose(lambda w: product_forward(x, w, geometry, precision), w)(dy)[0]
