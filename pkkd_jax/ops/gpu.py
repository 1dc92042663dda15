"""Adder convolution on Hopper GPUs: Mosaic GPU kernels of Pallas, or the portable form.

Forward and input gradient are one kernel, `mosaic.gather`. For it pixels are laid out as
`[channels, rows, phases of a stride, columns * batch]`, so that the patches of a tile are
contiguous wherever a tap moves them, and nothing is unfolded in memory: split by phase, a stride
is 1.

Sums are float32. Forward, float16 stays such and is added eight at a time in its own type, two in
an instruction, whose error is of the order of the result's own rounding; bfloat16, for which that
is slower, and operands of the input gradient are cast to float32. There a NaN in `x` or `w` counts
as a difference of -1: it is the forward pass that shows it.
"""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.ops import gather, portable
from pkkd_jax.ops.geometry import Geometry, Pair

# Mosaic GPU is supported from this version of JAX on, and its kernels are for this architecture.
JAX_VERSION = (0, 11, 2)
COMPUTE_CAPABILITY = "9.0"

ALIGNMENT = 16  # bytes, of the strides of a copy and of where it begins
GRID = 65535  # the most that CUDA counts in y and z


@functools.cache
def selected() -> str:
    """The implementation for CUDA: "mosaic", or "portable" where it cannot run, which is said once.

    Without a GPU in this process, a program is lowered for an absent one, taken to be a Hopper.
    """
    try:
        capability = jax.devices("gpu")[0].compute_capability
    except RuntimeError:
        capability = COMPUTE_CAPABILITY
    if jax.__version_info__ < JAX_VERSION:
        missing = f"JAX {'.'.join(map(str, JAX_VERSION))} or newer, not {jax.__version__}"
    elif capability != COMPUTE_CAPABILITY:
        missing = f"a GPU of compute capability {COMPUTE_CAPABILITY}, not {capability}"
    else:
        return "mosaic"
    warnings.warn(
        f"adder convolutions run as plain JAX, several times slower: the kernels need {missing}",
        stacklevel=2,
    )
    return "portable"


def forward(x: jax.Array, w: jax.Array, geometry: Geometry, interpret: Any = None) -> jax.Array:
    """`portable.forward`; `interpret` is that of `plgpu.kernel`."""
    shape = geometry.output_shape(x.shape, w.shape)
    if gather.empty(x, w) or 0 in shape or not _serves(shape, geometry):
        return portable.forward(x, w, geometry)
    dtype = jnp.promote_types(x.dtype, w.dtype)
    if dtype == jnp.bfloat16:
        dtype = jnp.float32  # which the card adds faster
    kernel = functools.partial(_gather, interpret=interpret)
    return gather.forward(x.astype(dtype), w.astype(dtype), geometry, kernel)


def input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry, interpret: Any = None
) -> jax.Array:
    """`portable.input_gradient`; `interpret` is that of `plgpu.kernel`."""
    if gather.empty(x, w, dy) or not _serves(x.shape, geometry):
        return portable.input_gradient(x, w, dy, geometry)
    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    kernel = functools.partial(_gather, interpret=interpret)
    return gather.input_gradient(x, w, dy, geometry, kernel)


def _serves(result, geometry: Geometry) -> bool:
    # Rows, and tiles of at least 64 of a row's places, are counted by a grid's y and z; a batch is
    # padded by fewer images than ALIGNMENT.
    small = max(result[1], (result[0] + ALIGNMENT) * result[2] // 64) < GRID
    return geometry.groups == 1 and small and selected() == "mosaic"


@functools.partial(
    jax.jit, static_argnames=("strides", "dilation", "size", "interpret", "surrogate")
)
def _gather(
    v: jax.Array,
    w: jax.Array,
    x: jax.Array | None,
    strides: Pair,
    dilation: Pair,
    size: Pair,
    surrogate: str,
    interpret: Any,
) -> jax.Array:
    """A `gather.Gather`; `interpret` is that of `plgpu.kernel`."""
    from pkkd_jax.ops import mosaic

    # One place further is one row of the batch: a copy must begin at a multiple of ALIGNMENT.
    batch, (kh, kw, k, c), (ho, wo) = v.shape[0], w.shape, size
    aligned = ALIGNMENT // v.dtype.itemsize
    n = math.ceil(batch / aligned) * aligned
    v, x = (a if a is None else jnp.pad(a, ((0, n - batch), *((0, 0),) * 3)) for a in (v, x))
    tile = mosaic.tile_of(ho, wo * n, c, x is not None)
    block = mosaic.block_of(k)
    grid = ho, math.ceil(wo * n / tile[0]), math.ceil(c / tile[1])
    places, channels = grid[1] * tile[0], grid[2] * tile[1]

    if surrogate == "hardtanh":
        # clip(w - x, -1, 1) = 2 sat(w / 2 + 1/2 - x / 2) - 1, and sat is one instruction.
        x, w = x / 2, w / 2 + 0.5
    # Channels beyond the last are zero in both operands and bring nothing.
    more = math.ceil(k / block) * block - k
    w = jnp.pad(w, ((0, 0), (0, 0), (0, more), (0, channels - c)))
    w = w.reshape(kh * kw, *w.shape[2:])
    columns = math.ceil(v.shape[2] / strides[1])
    v = jnp.pad(v, ((0, 0), (0, 0), (0, columns * strides[1] - v.shape[2]), (0, more)))
    v = v.reshape(n, v.shape[1], columns, strides[1], -1).transpose(4, 1, 3, 2, 0)
    v = v.reshape(*v.shape[:3], columns * n)
    reach = max(columns * n, (kw - 1) * dilation[1] // strides[1] * n + places)
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, reach - columns * n)))
    if x is not None:
        x = x.transpose(1, 2, 0, 3).reshape(ho, wo * n, c)
        x = jnp.pad(x, ((0, 0), (0, places - wo * n), (0, channels - c)))

    def offset(tap):
        down, right = tap // kw * dilation[0], tap % kw * dilation[1]
        return down, lax.rem(right, strides[1]), right // strides[1] * n

    y = mosaic.gather(
        v,
        w,
        x,
        tile=tile,
        block=block,
        grid=grid,
        offset=offset,
        stride=strides[0],
        surrogate=surrogate,
        interpret=interpret,
    )
    return y[:, : wo * n, :c].reshape(ho, wo, n, c)[:, :, :batch].transpose(2, 0, 1, 3)
