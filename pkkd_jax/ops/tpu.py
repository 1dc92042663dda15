"""Adder convolution on TPUs: a Pallas kernel, or the portable form.

Filters lie along sublanes and images along lanes, so that a vector register is full whatever the
number of channels is; for each term a pixel's row is broadcast along sublanes by the load, and a
filter's column along lanes. Pixels are laid out as `[rows, channels, columns * batch]`, the batch
padded to whole registers: what a tap sees of a tile is a slice that begins at a multiple of it. All
is float32.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.ops import gather, portable
from pkkd_jax.ops.geometry import Geometry, Pair

LANES, SUBLANES = 128, 8
LEAST_BATCH = LANES // 2  # of a device: below, the padding costs more than the kernel gains
VMEM = (
    14 << 20
)  # bytes that the blocks of an operation may take, of the 16 MiB there are by default
UNROLLED = 128  # terms of an output without a loop


def forward(x: jax.Array, w: jax.Array, geometry: Geometry, interpret: bool = False) -> jax.Array:
    """`portable.forward`; `interpret` is that of `pl.pallas_call`."""
    shape = geometry.output_shape(x.shape, w.shape)
    if 0 in shape or not _serves(x, w, geometry, interpret):
        return portable.forward(x, w, geometry)
    x, w = (a.astype(jnp.float32) for a in (x, w))
    return gather.forward(x, w, geometry, functools.partial(_gather, interpret=interpret))


def input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry, interpret: bool = False
) -> jax.Array:
    """`portable.input_gradient`; `interpret` is that of `pl.pallas_call`."""
    if gather.empty(dy) or not _serves(x, w, geometry, interpret):
        return portable.input_gradient(x, w, dy, geometry)
    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    kernel = functools.partial(_gather, interpret=interpret)
    return gather.input_gradient(x, w, dy, geometry, kernel)


def _serves(x, w, geometry: Geometry, interpret: bool) -> bool:
    if geometry.groups != 1 or gather.empty(x, w) or (x.shape[0] < LEAST_BATCH and not interpret):
        return False
    # What a tile sees, twice since the next is fetched meanwhile; at least 512 lanes of it.
    batch = _whole(x.shape[0], LANES)
    lanes = 4 * LANES + (w.shape[1] - 1) * geometry.dilation[1] * batch
    channels = _whole(max(w.shape[2:]), SUBLANES)
    return 2 * 4 * w.shape[0] * channels * lanes <= VMEM


def _whole(size: int, unit: int) -> int:
    return math.ceil(size / unit) * unit


class Tiling(NamedTuple):
    """What a kernel computes at once: `rows` filters by `width` pixels, `block` terms a step."""

    rows: int
    width: int
    block: int


def tiling(pixels: int, terms: int, channels: int, gradient: bool) -> Tiling:
    """For rows of so many pixels, with so many terms a tap, and so many channels of the result."""
    # A tile fills 32 registers, or 16 where there is an input beside it or where the fewer filters
    # need fewer broadcasts along lanes.
    rows = min(32 if gradient else 64, _whole(channels, SUBLANES))
    registers = 32 if rows == 64 else 16
    width = min(registers * SUBLANES // rows * LANES, pixels)
    return Tiling(rows, width, min(LANES, _whole(terms, SUBLANES)))


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
    rows, width, block = tiling(wo * n, k, c, x is not None)
    blocks = math.ceil(k / block)
    steps = kw * blocks
    tiles = ho, math.ceil(wo * n / width), math.ceil(c / rows)
    places, channels = tiles[1] * width, tiles[2] * rows
    seen = width + (kw - 1) * dilation[1] // strides[1] * n

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
                    y = y - jnp.abs(pixel - weight)
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
    )(*[v] * kh, w, *([] if x is None else [x]))
    return y[:, :c, : wo * n].reshape(ho, c, wo, n).transpose(3, 0, 2, 1)[:images]
