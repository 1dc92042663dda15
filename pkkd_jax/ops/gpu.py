"""Adder convolution on Hopper GPUs: Mosaic GPU kernels of Pallas, or the portable form.

Forward and input gradient are one kernel. A tile of the result, places of images by channels,
stays in the registers of a warpgroup, while what it is made of streams through shared memory: a
row of pixels of one channel and a row of filters a step. Pixels are laid out as `[channels, rows,
columns * batch]`, so that the patches of a tile are contiguous wherever a tap moves them, and
nothing is unfolded in memory; a column stride becomes stride 1 once columns are split by phase.

Half-precision operands are cast to float32, in which all sums are made.
"""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.ops import portable
from pkkd_jax.ops.geometry import Geometry, Pair

# Mosaic GPU is supported from this version of JAX on, and its kernels are for this architecture.
JAX_VERSION = (0, 11, 2)
COMPUTE_CAPABILITY = "9.0"

# Places and channels of a tile, and the terms that it makes in a picosecond, forward and in the
# input gradient: measured on an H100 SXM at layers that fill it (jax 0.11.2).
TILES = {
    (128, 64): (13.97, 10.84),
    (64, 64): (12.57, 11.51),
    (256, 32): (12.42, 10.18),
    (128, 32): (12.03, 9.94),
    (64, 32): (10.68, 9.18),
    (256, 16): (11.85, 8.97),
    (128, 16): (11.17, 8.47),
}
PROCESSORS = 132
STAGES = 3  # of the pipeline from global to shared memory
BLOCKS = (32, 16, 8)  # channels in a stage
UNROLLED = 8  # channels in the program, whose compilation takes as long as it is
ALIGNMENT = 4  # float32 elements: strides of a copy are multiples of 16 bytes
STEEP = 2.0**126  # slope at which a saturated line is the sign function


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
    if geometry.groups != 1 or 0 in (*shape, *w.shape) or selected() == "portable":
        return portable.forward(x, w, geometry)
    x = portable.pad_or_crop(x.astype(jnp.float32), *geometry.padding)
    w = w.astype(jnp.float32)
    return _gather(x, w, None, geometry.strides, geometry.dilation, shape[1:3], interpret)


def input_gradient(
    x: jax.Array, w: jax.Array, dy: jax.Array, geometry: Geometry, interpret: Any = None
) -> jax.Array:
    """`portable.input_gradient`; `interpret` is that of `plgpu.kernel`."""
    if geometry.groups != 1 or 0 in x.shape or 0 in dy.shape or selected() == "portable":
        return portable.input_gradient(x, w, dy, geometry)
    x, w, dy = (a.astype(jnp.float32) for a in (x, w, dy))
    if geometry.input_gradient == "full":  # linear: sum dy * w - x * sum dy
        ones = jnp.ones((*w.shape[:2], 1, w.shape[3]), jnp.float32)
        products, sums = (
            portable.product_input_gradient(
                kernel, dy, geometry, None, (*x.shape[:3], kernel.shape[2])
            )
            for kernel in (w, ones)
        )
        return products - x * sums
    # clip(w - x, -1, 1) = 2 sat(w / 2 + 1/2 - x / 2) - 1, of which the kernel computes sat, one
    # instruction. The sign is such a line too, but of the exact difference.
    if geometry.input_gradient == "hardtanh":
        x, w = x / 2, w / 2 + 0.5

    def gradient(place, padded, us, vs, rows, columns):
        # The last tap sees the first pixels: in reverse, it is a convolution of dy.
        taps = w[us[0] : us[-1] + 1 : _step(us), vs[0] : vs[-1] + 1 : _step(vs)]
        taps = taps[::-1, ::-1].transpose(0, 1, 3, 2)
        padded = padded[:, rows[-1] :, columns[-1] :]
        dilation = -_step(rows), -_step(columns)
        return _gather(
            padded, taps, place, (1, 1), dilation, place.shape[1:3], interpret,
            geometry.input_gradient,
        )

    return portable.by_phase(x, w.shape[:2], dy, geometry, gradient)


def _step(numbers: list[int]) -> int:
    return numbers[1] - numbers[0] if len(numbers) > 1 else 1


def _tile(rows: int, places: int, channels: int, gradient: bool) -> Pair:
    """The tile that is done first with `rows` rows of `places`, each of so many channels."""

    def time(tile):
        tiles = rows * math.ceil(places / tile[0]) * math.ceil(channels / tile[1])
        return math.ceil(tiles / PROCESSORS) * tile[0] * tile[1] / TILES[tile][gradient]

    return min(TILES, key=time)


def _layout(tile: Pair):
    """Of a tile in the registers of a warpgroup: 4 x 4 and its multiples a thread."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    rows, vector = min(tile[0] // 32, 4), 4
    # Four warps one below the other; in each, eight lanes below and four beside each other.
    tiling = ((32 * rows, 4 * vector), (8 * rows, 4 * vector), (rows, vector))
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1
    )


def _saturate(layout, shape, interpret):
    """Clips to 0..1: one modifier of the instruction that made the argument."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if interpret:
        return lambda x: jnp.clip(x, 0, 1)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout),
    )
    def saturate(_, x):
        return x._pointwise(x._lift_fast_instr("cvt.sat.f32.f32"))

    return saturate


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
    interpret: Any = None,
    surrogate: str = "",
) -> jax.Array:
    """Sums over taps and channels: `-|v - w|`, or with `x` what dy = v brings to its gradient.

    Args:
      v: `[batch, height, width, k]`, padded so that each tap of each place exists.
      w: `[kh, kw, k, c]`.
      x: `[batch, *size, c]`, or None.
      strides, dilation: as of a convolution.
      size: rows and columns of the result.
      interpret: of `plgpu.kernel`.
      surrogate: with `x`, "hardtanh" (of scaled operands) or "sign".
    Returns:
      `[batch, *size, c]`, float32.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as plgpu

    n, (kh, kw, k, c), (ho, wo) = v.shape[0], w.shape, size
    tile = rows, channels = _tile(ho, wo * n, c, x is not None)
    # The least padding, and then the longest.
    block = min(BLOCKS, key=lambda size: (math.ceil(k / size) * size, -size))
    layout = _layout(tile)
    row_tiles, channel_tiles = math.ceil(wo * n / rows), math.ceil(c / channels)

    # Channels beyond the last are zero in both operands and bring nothing.
    steps = math.ceil(k / block)
    more = steps * block - k
    w = jnp.pad(w, ((0, 0), (0, 0), (0, more), (0, channel_tiles * channels - c)))
    w = w.reshape(kh * kw, *w.shape[2:])
    columns = math.ceil(v.shape[2] / strides[1])
    v = jnp.pad(v, ((0, 0), (0, 0), (0, columns * strides[1] - v.shape[2]), (0, more)))
    v = v.reshape(n, v.shape[1], columns, strides[1], -1).transpose(4, 1, 3, 2, 0)
    v = v.reshape(*v.shape[:3], columns * n)
    reach = (kw - 1) * dilation[1] // strides[1] * n + row_tiles * rows
    reach = math.ceil(max(reach, columns * n) / ALIGNMENT) * ALIGNMENT
    v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, reach - columns * n)))
    operands = [v, w]
    if x is not None:
        x = x.transpose(1, 2, 0, 3).reshape(ho, wo * n, c)
        beyond = (0, row_tiles * rows - wo * n), (0, channel_tiles * channels - c)
        operands.append(jnp.pad(x, ((0, 0), *beyond)))

    def pixels(tap, step):
        down, right = tap // kw * dilation[0], tap % kw * dilation[1]
        row = lax.axis_index("row") * strides[0] + down
        shift = right // strides[1] * n
        place = lax.axis_index("places") * rows + shift
        return step, row, lax.rem(right, strides[1]), place

    def filters(tap, step):
        return tap, step, lax.axis_index("channels")

    def down(column):
        return lax.broadcast_in_dim(column, tile, (0,))

    def across(row):
        return lax.broadcast_in_dim(row, tile, (1,))

    def body(v_gmem, w_gmem, *rest):
        (*x_gmem, y_gmem) = rest
        at = (
            lax.axis_index("row"),
            pl.ds(lax.axis_index("places") * rows, rows),
            pl.ds(lax.axis_index("channels") * channels, channels),
        )
        zeros = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), layout)

        def each(add):
            def step(_, v_smem, w_smem, sums):
                def some(trip, sums):
                    for index in range(UNROLLED):
                        at = trip * UNROLLED + index
                        pixel = plgpu.load(v_smem.at[at], layout=layout.reduce(1), optimized=False)
                        weight = plgpu.load(w_smem.at[at], layout=layout.reduce(0), optimized=False)
                        sums = add(sums, pixel, weight)
                    return sums

                return lax.fori_loop(0, block // UNROLLED, some, sums)

            return step

        def add_distance(y, pixel, weight):
            return y - jnp.abs(down(pixel) - across(weight))

        def add_gradient(sums, dy, weight):
            line = across(weight) - here
            if surrogate == "sign":
                line = line * STEEP + 0.5
            return sums[0] + down(dy) * saturate(line), sums[1] + dy

        if x is None:
            add, start = add_distance, zeros
        else:
            here = plgpu.load(x_gmem[0].at[at], layout=layout, optimized=False)
            saturate = _saturate(layout, tile, interpret)
            total = plgpu.layout_cast(jnp.zeros(rows, jnp.float32), layout.reduce(1))
            add, start = add_gradient, (zeros, total)
        sums = plgpu.emit_pipeline(
            each(add),
            grid=(kh * kw, steps),
            in_specs=[
                plgpu.BlockSpec(
                    (pl.Blocked(block), pl.squeezed, pl.squeezed, pl.Element(rows)), pixels
                ),
                plgpu.BlockSpec((pl.squeezed, pl.Blocked(block), pl.Blocked(channels)), filters),
            ],
            max_concurrent_steps=min(STAGES, kh * kw * steps),
            init_carry=start,
        )(v_gmem, w_gmem)
        if x is not None:
            sums = 2 * sums[0] - down(sums[1])
        if hasattr(plgpu, "store"):  # JAX 0.12 and newer, where the other would refuse narrow tiles
            plgpu.store(y_gmem.at[at], sums, optimized=False)
        else:
            y_gmem[at] = sums

    shape = (ho, row_tiles * rows, channel_tiles * channels)
    y = plgpu.kernel(
        body,
        out_type=jax.typeof(v).update(shape=shape),
        grid=(ho, row_tiles, channel_tiles),
        grid_names=("row", "places", "channels"),
        interpret=interpret,
    )(*operands)
    return y[:, : wo * n, :c].reshape(ho, wo, n, c).transpose(2, 0, 1, 3)

