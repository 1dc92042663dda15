"""Adder convolution on TPUs: a Pallas kernel, or the portable form.

Filters lie along sublanes and images along lanes, so that a vector register is full whatever the
number of channels is; for each term a pixel's row is broadcast along sublanes by the load, and a
filter's column along lanes. Pixels are laid out as `[rows, phases of a stride, channels, columns *
batch]`, the batch padded to whole registers: what a tap sees of a tile is a slice that begins at a
multiple of it. All is float32.

Forward the kernel sums the greater of pixel and filter, two instructions a term instead of three:

    -sum |x - w| = sum x + sum w - 2 sum max(x, w)

One filter's value is taken from each channel of both first, or an offset that images and filters
share would cancel.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.ops import gather, portable
from pkkd_jax.ops.geometry import Geometry, Pair

NAME = "adder_gather"  # of the kernel, in dumps and profiles
LANES, SUBLANES = 128, 8
LEAST_BATCH = LANES // 2  # of a device: below, the padding costs more than the kernel gains
VMEM = 14 << 20  # bytes for the blocks of a kernel, of the 16 MiB that there are by default
UNROLLED = 128  # terms of an output without a loop


def forward(x: jax.Array, w: jax.Array, geometry: Geometry, interpret: bool = False) -> jax.Array:
    """`portable.forward`; `interpret` is that of `pl.pallas_call`."""
    shape = geometry.output_shape(x.shape, w.shape)
    if gather.empty(x, w) or 0 in shape or not _serves(w, shape, geometry, False, interpret):
        return portable.forward(x, w, geometry)
    x, w = (a.astype(jnp.float32) for a in (x, w))
    return gather.forward(x, w, geometry, functools.partial(_gather, interpret=interpret))


def input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry, interpret: bool = False
) -> jax.Array:
    """`portable.input_gradient`; `interpret` is that of `pl.pallas_call`."""
    if gather.empty(x, w, dy) or not _serves(w, x.shape, geometry, True, interpret):
        return portable.input_gradient(x, w, dy, geometry)
    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    kernel = functools.partial(_gather, interpret=interpret)
    return gather.input_gradient(x, w, dy, geometry, kernel)


def _serves(w, result, geometry: Geometry, gradient: bool, interpret: bool) -> bool:
    """Whether the kernel for a result of that shape fits, and is worth it."""
    if geometry.groups != 1 or (result[0] < LEAST_BATCH and not interpret):
        return False
    taps, channels, strides = w.shape[:2], w.shape[2:], geometry.strides
    if gradient:  # whose phases have some of these taps, and no stride
        channels, strides = channels[::-1], (1, 1)
    batch = _whole(result[0], LANES)
    return (
        tiling((*taps, *channels), result[2], batch, strides, geometry.dilation, gradient)
        is not None
    )


def _whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


class Tiling(NamedTuple):
    """What a kernel computes at once: `rows` filters by `width` pixels, `block` terms a step."""

    rows: int
    width: int
    block: int


def tiling(
    w_shape, columns: int, batch: int, strides: Pair, dilation: Pair, gradient: bool
) -> Tiling | None:
    """The tiling of a `gather.Gather`; None if none fits the memory beside the vector unit.

    Args:
      w_shape: of its filters.
      columns: of its result.
      batch: in whole registers.
      strides, dilation: of it.
      gradient: whether it has an input `x`.
    """
    kh, kw, terms, channels = w_shape
    blocks = math.ceil(terms / LANES)
    block = _whole(math.ceil(terms / blocks), SUBLANES)
    rows = min(32 if gradient else 64, _whole(channels, SUBLANES))

    def fits(width):
        seen = width + (kw - 1) * dilation[1] // strides[1] * batch
        floats = kh * strides[1] * blocks * block * seen
        floats += kh * kw * blocks * rows * LANES
        floats += (1 + gradient) * rows * width
        return 2 * 4 * floats <= VMEM  # twice: the next blocks are fetched meanwhile

    # A tile fills 32 registers, or 16 where there is an input beside it or where the fewer filters
    # need fewer broadcasts along lanes; one register wide, its loads would not compile.
    width = (32 if rows == 64 else 16) * SUBLANES // rows * LANES
    while width > 2 * LANES and (width >= 2 * columns * batch or not fits(width)):
        width //= 2
    return Tiling(rows, width, block) if fits(width) else None


@functools.partial(
    jax.jit, static_argnames=("strides", "dilation", "size", "surrogate", "interpret")
)
def _gather(
    v: jax.Array,
    w: jax.Array,
    x: jax.Array | None,
    strides: Pair,
    dilation: Pair,
    size: Pair,
    surrogate: str,
    interpret: bool,
) -> jax.Array:
    """A `gather.Gather`; `interpret` is that of `pl.pallas_call`."""
    from jax.experimental import pallas as pl

    (kh, kw, k, c), (ho, wo) = w.shape, size
    images, n = v.shape[0], _whole(v.shape[0], LANES)
    rows, width, block = tiling(w.shape, wo, n, strides, dilation, x is not None)
    blocks = math.ceil(k / block)
    steps = kw * blocks
    tiles = ho, math.ceil(wo * n / width), math.ceil(c / rows)
    places, channels = tiles[1] * width, tiles[2] * rows
    seen = width + (kw - 1) * dilation[1] // strides[1] * n

    if x is None:
        # Not a mean: compiled into two places, it may be rounded in two ways.
        centre = w[0, 0, :, 0]
        v, w = v - centre, w - centre[:, None]
        sums = lax.reduce_window(
            v.sum(3), 0.0, lax.add, (1, kh, kw), (1, *strides), "VALID", None, (1, *dilation)
        )
        sums = sums[:, :ho, :wo, None] + w.sum((0, 1, 2))
    columns = math.ceil(v.shape[2] / strides[1])
    beyond = columns * strides[1] - v.shape[2]
    # Channels beyond the last are zero in both operands and bring nothing.
    v = jnp.pad(v, ((0, n - images), (0, 0), (0, beyond), (0, blocks * block - k)))
    v = v.reshape(n, v.shape[1], columns, strides[1], -1).transpose(1, 3, 4, 2, 0)
    v = v.reshape(*v.shape[:3], columns * n)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, max(0, places - width + seen - columns * n))))
    w = jnp.pad(w, ((0, 0), (0, 0), (0, blocks * block - k), (0, channels - c)))
    w = w.reshape(kh, steps, block, channels).swapaxes(2, 3)
    if x is not None:
        x = jnp.pad(x, ((0, n - images), (0, 0), (0, 0), (0, channels - c)))
        x = x.transpose(1, 3, 2, 0).reshape(ho, channels, wo * n)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, places - wo * n)))

    def kernel(*refs):
        v_refs, w_ref, (*x_ref, y_ref) = refs[:kh], refs[kh], refs[kh + 1 :]
        here = x_ref[0][0] if x_ref else None

        def add(u, step, y):
            tap, part = lax.div(step, blocks), lax.rem(step, blocks)
            right = tap * dilation[1]
            phase, start = lax.rem(right, strides[1]), lax.div(right, strides[1]) * n
            lanes = pl.ds(pl.multiple_of(start, LANES), width)
            for term in range(block):
                pixel = v_refs[u][0, phase, pl.ds(part * block + term, 1), lanes]
                weight = w_ref[u, step, :, term : term + 1]
                if here is None:
                    y = y + jnp.maximum(pixel, weight)
                elif surrogate == "hardtanh":
                    y = y + pixel * jnp.clip(weight - here, -1, 1)
                else:
                    difference = weight - here
                    y = y + jnp.where(difference > 0, pixel, jnp.where(difference < 0, -pixel, 0))
            return y

        y = jnp.zeros((rows, width), jnp.float32)
        for u in range(kh):
            one_by_one = steps * block <= UNROLLED
            y = lax.fori_loop(0, steps, functools.partial(add, u), y, unroll=one_by_one)
        y_ref[0] = y

    def pixels(u):
        return pl.BlockSpec(
            tuple(map(pl.Element, (1, strides[1], blocks * block, seen))),
            lambda i, j, _: (i * strides[0] + u * dilation[0], 0, 0, j * width),
        )

    tile = pl.BlockSpec((1, rows, width), lambda i, j, o: (i, o, j))
    y = pl.pallas_call(
        kernel,
        grid=tiles,
        in_specs=[
            *map(pixels, range(kh)),
            pl.BlockSpec((kh, steps, rows, block), lambda i, j, o: (0, 0, o, 0)),
            *([] if x is None else [tile]),
        ],
        out_specs=tile,
        out_shape=jax.typeof(v).update(shape=(ho, channels, places)),
        interpret=interpret,
        name=NAME,
    )(*[v] * kh, w, *([] if x is None else [x]))
    y = y[:, :c, : wo * n].reshape(ho, c, wo, n).transpose(3, 0, 2, 1)[:images]
    return sums - 2 * y if x is None else y
