"""The kernels of `gpu.py`, in Pallas for Mosaic GPU: imported where they are used only.

A tile of the result stays in the registers of a warpgroup, while what it is made of streams through
shared memory: per channel a row of pixels, one for each line of the tile, and a row of filters.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pkkd_jax.ops.geometry import Pair

# Places and channels of a tile, and the terms that it makes in a picosecond, forward and in the
# input gradient, in float32: measured on an H200 at layers that fill it (jax 0.11.2).
TILES = {
    (128, 64): (14.40, 11.36),
    (64, 64): (12.77, 11.45),
    (256, 32): (13.37, 10.68),
    (128, 32): (13.09, 10.70),
    (64, 32): (11.95, 10.60),
    (256, 16): (11.69, 9.44),
    (128, 16): (11.26, 8.83),
}
PROCESSORS = 132
STAGES = 3  # of the pipeline from global to shared memory
BLOCKS = (32, 16, 8)  # channels in a stage
UNROLLED = 8  # channels in the program, whose compilation takes as long as it is
STEEP = 2.0**126  # slope at which a saturated line is the sign function


def tile_of(rows: int, places: int, channels: int, gradient: bool) -> Pair:
    """The tile that is done first with `rows` rows of `places`, each of so many channels."""

    def time(tile):
        tiles = rows * math.ceil(places / tile[0]) * math.ceil(channels / tile[1])
        return math.ceil(tiles / PROCESSORS) * tile[0] * tile[1] / TILES[tile][gradient]

    return min(TILES, key=time)


def block_of(channels: int) -> int:
    """Channels of a stage: with the least padding, and then the most."""
    return min(BLOCKS, key=lambda size: (math.ceil(channels / size) * size, -size))


def gather(
    v: jax.Array,
    w: jax.Array,
    x: jax.Array | None,
    *,
    tile: Pair,
    block: int,
    grid: tuple[int, int, int],
    offset: Callable,
    stride: int,
    surrogate: str,
    interpret: Any,
) -> jax.Array:
    """Sums over taps and channels: `-|v - w|`, or with `x` what dy = v brings to its gradient.

    Args:
      v: `[k, height, phases, length]`, k in whole blocks.
      w: `[taps, k, c]`, c in whole tiles; float32 with `x`.
      x: `[rows, places, c]`, places in whole tiles, or None.
      tile, block: of `TILES` and `BLOCKS`.
      grid: rows of the result, and tiles along its places and its channels.
      offset: `tap -> (row, phase, place)` in `v` of what the first place sees through it.
      stride: rows of `v` from one row of the result to the next.
      surrogate: with `x`, "hardtanh" (of operands that are scaled for `sat`) or "sign".
      interpret: of `plgpu.kernel`.
    Returns:
      `[rows, places, c]`, float32.
    """
    places, channels = tile
    layout = layout_of(tile, v.dtype)

    def pixels(tap, step):
        row, phase, place = offset(tap)
        row += lax.axis_index("row") * stride
        return step, row, phase, lax.axis_index("places") * places + place

    def filters(tap, step):
        return tap, step, lax.axis_index("channels")

    def stage(add):
        def some(v_smem, w_smem, trip, sums):
            rows = [trip * UNROLLED + index for index in range(UNROLLED)]
            pixels, weights = (
                [plgpu.load(ref.at[i], layout=layout.reduce(axis), optimized=False) for i in rows]
                for ref, axis in ((v_smem, 1), (w_smem, 0))
            )
            return add(sums, pixels, weights)

        def body(_, v_smem, w_smem, sums):
            return lax.fori_loop(0, block // UNROLLED, partial(some, v_smem, w_smem), sums)

        return body

    def kernel(v_gmem, w_gmem, *rest):
        (*x_gmem, y_gmem) = rest
        at = (
            lax.axis_index("row"),
            pl.ds(lax.axis_index("places") * places, places),
            pl.ds(lax.axis_index("channels") * channels, channels),
        )
        zeros = plgpu.layout_cast(jnp.zeros(tile, jnp.float32), layout)
        if x is None:
            add, start = partial(_add_distances, tile), zeros
        else:
            here = plgpu.load(x_gmem[0].at[at], layout=layout, optimized=False)
            saturate = _saturate(tile, layout, interpret)
            add = partial(_add_gradients, tile, here, surrogate, saturate)
            total = plgpu.layout_cast(jnp.zeros(places, jnp.float32), layout.reduce(1))
            start = zeros, total
        y = plgpu.emit_pipeline(
            stage(add),
            grid=(w.shape[0], v.shape[0] // block),
            in_specs=[
                plgpu.BlockSpec(
                    (pl.Blocked(block), pl.squeezed, pl.squeezed, pl.Element(places)), pixels
                ),
                plgpu.BlockSpec((pl.squeezed, pl.Blocked(block), pl.Blocked(channels)), filters),
            ],
            max_concurrent_steps=STAGES,
            init_carry=start,
        )(v_gmem, w_gmem)
        if x is not None:
            y = 2 * y[0] - _down(tile, y[1])
        store(y_gmem.at[at], y)

    shape = (grid[0], grid[1] * places, grid[2] * channels)
    return plgpu.kernel(
        kernel,
        out_type=jax.typeof(v).update(shape=shape, dtype=jnp.float32),
        grid=grid,
        grid_names=("row", "places", "channels"),
        interpret=interpret,
    )(v, w, *(() if x is None else (x,)))


def store(place, y: jax.Array) -> None:
    """Writes a tile to `place`, a reference."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on, where assignments refuse narrow tiles
        plgpu.store(place, y, optimized=False)
    else:
        place[...] = y


def _down(tile: Pair, column: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(column, tile, (0,))


def _across(tile: Pair, row: jax.Array) -> jax.Array:
    return lax.broadcast_in_dim(row, tile, (1,))


def _add_distances(tile, y, pixels, weights):
    few = [
        jnp.abs(_down(tile, pixel) - _across(tile, weight))
        for pixel, weight in zip(pixels, weights, strict=True)
    ]
    if few[0].dtype != jnp.float32:  # in half precision, which two additions share, by twos
        while len(few) > 1:
            few = [a + b for a, b in zip(few[::2], few[1::2], strict=True)]
    for distance in few:
        y = y - distance.astype(jnp.float32)
    return y


def _add_gradients(tile, x, surrogate, saturate, sums, pixels, weights):
    dx, total = sums
    for dy, weight in zip(pixels, weights, strict=True):
        line = _across(tile, weight) - x
        if surrogate == "sign":
            line = line * STEEP + 0.5
        dx, total = dx + _down(tile, dy) * saturate(line), total + dy
    return dx, total


def _saturate(tile: Pair, layout, interpret) -> Callable:
    """Clips to 0..1: one modifier of the instruction that made the argument."""
    if interpret:
        return lambda x: jnp.clip(x, 0, 1)

    @plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(tile, jnp.float32, layout=layout),
    )
    def saturate(_, x):
        return x._pointwise(x._lift_fast_instr("cvt.sat.f32.f32"))

    return saturate


def layout_of(tile: Pair, dtype):
    """Of a tile in a warpgroup: a thread has up to 4 rows of 16 bytes, and multiples of that."""
    rows, vector = min(tile[0] // 32, 4), min(16 // dtype.itemsize, tile[1] // 4)
    # Four warps one below the other; in each, eight lanes below and four beside each other.
    tiling = ((32 * rows, 4 * vector), (8 * rows, 4 * vector), (rows, vector))
    return plgpu.Layout.TILED(
        plgpu.Tiling(tiling), warp_dims=(-6,), lane_dims=(-4, -3), vector_dim=-1
    )
