"""Rates of the kernels for Hopper GPUs by tile: the table `TILES` of `pkkd_jax/ops/mosaic.py`.

python benchmarks/tune_gpu.py [--json FILE]     (on an H100 or H200)

Each tile computes a layer of as many channels as it has, 28 x 28 pixels of 256 images, so that it
fills the card. Times are those of the kernels alone, from JAX's profiler.
"""

import argparse
import functools
import json
from pathlib import Path

import jax
from adder_gpu import device_seconds, require_hopper

from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops import gpu, mosaic

BATCH, SIZE, TAPS = 256, 28, 3
LIMIT = (
    mosaic.PROCESSORS * 128 * 1.98e9 / 2
)  # terms a second: processors, lanes, clock, two instructions each


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="file for all figures")
    arguments = parser.parse_args()
    require_hopper()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; limit {LIMIT / 1e12:.1f} T/s")
    rates = {}
    for tile in list(mosaic.TILES):
        mosaic.TILES = {tile: (1.0, 1.0)}  # so that it is chosen
        jax.clear_caches()
        channels = tile[1]
        shape = (BATCH, SIZE, SIZE, channels)
        keys = jax.random.split(jax.random.key(0), 3)
        x, dy = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], shape)
        w = jax.random.normal(keys[2], (TAPS, TAPS, channels, channels))
        geometry = geometry_lib.resolve(shape, w.shape, 1, "SAME", 1, 1, "hardtanh")
        terms = x.size * TAPS * TAPS * channels
        functions = [
            functools.partial(
                jax.jit(functools.partial(rule, geometry=geometry)).lower(*operands).compile(),
                *operands,
            )
            for rule, operands in ((gpu.forward, (x, w)), (gpu.input_gradient, (x, w, dy)))
        ]
        pair = [
            terms / sum(seconds for name, seconds in kernels.items() if "mosaic" in name)
            for kernels in device_seconds(functions)
        ]
        rates[tile] = pair
        print(
            f"    {tile}: ({pair[0] / 1e12:.2f}, {pair[1] / 1e12:.2f}),"
            f"  # {pair[0] / LIMIT:.0%} and {pair[1] / LIMIT:.0%} of the limit",
            flush=True,
        )
    if arguments.json:
        table = {str(tile): pair for tile, pair in rates.items()}
        Path(arguments.json).write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
