"""The part of adder.py for an NVIDIA GPU: what the card can do, and the kernels beside it.

All times are those of the card's kernels, from JAX's profiler.
"""

import glob
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import layers
from jax import lax

from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops import gpu, portable

BATCH = 256
PRODUCT = 8192  # rows and columns of a large matrix
COPY = 1 << 28  # numbers of a large array
ROUNDS, UNROLLED = 1 << 15, 4
OTHERS = ("plain JAX", "convolution")


def require_hopper() -> None:
    """Ends the program where the kernels cannot run."""
    if jax.default_backend() != "gpu" or gpu.selected() != "mosaic":
        sys.exit(f"error: no Hopper GPU here, but {jax.devices()[0].device_kind}: run it on one")


def device_seconds(functions: Sequence[Callable], calls: int = 5) -> list[dict[str, float]]:
    """For each function the seconds that one call spends in each kernel of the card.

    A kernel of a function of their own stands between those of two functions.
    """
    mark = jax.jit(lax.cbrt)
    for function in (partial(mark, 0.5), *functions):  # what is done once is done
        jax.block_until_ready(function())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for function in functions:
                for _ in range(calls):
                    jax.block_until_ready(function())
                mark(0.5).block_until_ready()
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        planes = jax.profiler.ProfileData.from_file(path).planes
        events = sorted(
            (event.start_ns, event.duration_ns, event.name)
            for plane in planes
            if "GPU" in plane.name
            for line in plane.lines
            if "tream" in line.name
            for event in line.events
        )
    found: list[dict[str, float]] = [{}]
    for _, nanoseconds, name in events:
        if "cbrt" in name:
            found.append({})
        else:
            found[-1][name] = found[-1].get(name, 0.0) + nanoseconds / calls / 1e9
    if len(found) != len(functions) + 1:
        raise RuntimeError(f"{len(found) - 1} marks in the profile of {len(functions)} functions")
    return found[:-1]


def additions() -> tuple[Callable, int]:
    """A function, and the terms it makes: a kernel of nothing but `c - |y - a|` in registers."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pkkd_jax.ops import mosaic

    tile = (128, 64)
    layout = mosaic.layout_of(tile, jnp.dtype("float32"))

    def some(_, y):
        for _ in range(UNROLLED):
            y = 1.5 - jnp.abs(y - 0.7)  # goes up below 0.7 and is mirrored above
        return y

    def kernel(y_gmem):
        y = plgpu.layout_cast(jnp.full(tile, 0.1, jnp.float32), layout)
        y = lax.fori_loop(0, ROUNDS // UNROLLED, some, y)
        mosaic.store(y_gmem.at[lax.axis_index("tile")], y)

    tiles = 4 * mosaic.PROCESSORS
    shape = jax.ShapeDtypeStruct((tiles, *tile), jnp.float32)
    run = plgpu.kernel(kernel, out_type=shape, grid=(tiles,), grid_names=("tile",))
    return run, ROUNDS * math.prod(shape.shape)


def ceilings() -> dict[str, float]:
    """Terms a second from registers, bytes a second of a copy, products a second by precision."""
    run, terms = additions()
    add = jax.jit(run)
    source = jnp.ones(COPY)
    matrix = jax.random.normal(jax.random.key(0), (PRODUCT, PRODUCT))
    half = matrix.astype(jnp.bfloat16)

    def product(precision):
        return jax.jit(lambda a: jnp.matmul(a, a, precision=precision))

    highest, default = product("highest"), product(None)
    copy = jax.jit(lambda a: a + 1)
    functions = [
        add,
        lambda: copy(source),
        lambda: highest(matrix),
        lambda: default(matrix),
        lambda: default(half),
    ]
    seconds = [sum(kernels.values()) for kernels in device_seconds(functions)]
    work = [terms, 2 * source.nbytes, *[PRODUCT**3] * 3]
    names = ("terms", "bytes copied", "float32 products", "TF32 products", "bfloat16 products")
    return {n: w / s for n, w, s in zip(names, work, seconds, strict=True)}


def passes(layer) -> dict[str, tuple[Callable, str]]:
    """Functions of x, w and dy, and their dtype, by pass; others than the kernels after a comma."""
    x, w = layers.shapes(layer)[:2]
    geometry = geometry_lib.resolve(x, w, (layer[6],) * 2, "SAME", 1, 1, "hardtanh")
    ours, theirs = (layers.jax_functions(layer, adder) for adder in (True, False))
    functions = {
        **ours,
        **{f"{name}, convolution": function for name, function in theirs.items()},
        "forward, plain JAX": lambda x, w, dy: portable.forward(x, w, geometry),
        "dx, plain JAX": lambda x, w, dy: portable.input_gradient(x, w, dy, geometry),
    }
    found = {name: (function, "float32") for name, function in functions.items()}
    return found | {dtype: (ours["forward"], dtype) for dtype in ("float16", "bfloat16")}


def rates() -> dict[str, dict[str, dict[str, float]]]:
    """By layer and pass: T terms a second of the whole pass, and of the adder kernel in it."""
    all_layers = [(BATCH, *layer[1:]) for layer in layers.LAYERS]

    def compiled(layer, function, dtype):
        shapes = layers.shapes(layer)[:3]
        return jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, dtype) for s in shapes)).compile()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = {
            layer: {
                name: (pool.submit(compiled, layer, function, dtype), dtype)
                for name, (function, dtype) in passes(layer).items()
            }
            for layer in all_layers
        }
    found = {}
    for layer, named in programs.items():
        arrays = layers.operands(layer)
        by_dtype = {dtype: [a.astype(dtype) for a in arrays] for _, dtype in named.values()}
        functions = [partial(program.result(), *by_dtype[d]) for program, d in named.values()]
        terms = layers.shapes(layer)[3] / 1e12
        row = found[layers.title(layer)] = {}
        for name, kernels in zip(named, device_seconds(functions), strict=True):
            row[name] = {"whole": terms / sum(kernels.values())}
            if own := sum(s for kernel, s in kernels.items() if "mosaic" in kernel):
                row[name]["kernel"] = terms / own
    return found


def measure() -> dict:
    """Measures and prints all."""
    require_hopper()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, adder op: {gpu.selected()}")
    result = {"ceilings": ceilings()}
    peak = result["ceilings"]["terms"] / 1e12
    for name, rate in result["ceilings"].items():
        print(f"{name:>20}: {rate / 1e12:.2f} T/s")
    result["layers"] = rates()
    print("T terms/s; share: of the kernel alone, of the terms that registers allow")
    print(f"{'':>28}" + "".join(f"{n:>9} {'kernel':>6} {'share':>5}" for n in ("forward", "dx")))
    for layer, row in result["layers"].items():
        print(f"{layer:>28}", end="")
        for name in ("forward", "dx"):
            kernel = row[name].get("kernel", math.nan)
            print(f"{row[name]['whole']:>9.2f} {kernel:>6.2f} {kernel / peak:>5.2f}", end="")
        print(f"   dw {row['dw']['whole']:.2f}", end="")
        for dtype in ("float16", "bfloat16"):
            gain = row[dtype].get("kernel", math.nan) / row["forward"].get("kernel", math.nan)
            print(f"   {dtype} x {gain:.2f}", end="")
        print()
    for other in OTHERS:
        print(other)
        for layer, row in result["layers"].items():
            names = [name for name in row if name.endswith(other)]
            cells = "  ".join(f"{n.partition(',')[0]} {row[n]['whole']:.2f}" for n in names)
            print(f"{layer:>28}   {cells}")
    for name in ("forward", "dx"):
        shares = [
            row[name]["kernel"] / peak
            for layer, row in result["layers"].items()
            if "3x3" in layer and "kernel" in row[name]
        ]
        print(f"{name}, 3x3: share {statistics.mean(shares):.2f}, least {min(shares):.2f}")
    return result
