"""Instructions a term in the kernels for Hopper GPUs, without a GPU.

python benchmarks/gpu_instructions.py [--json FILE]     (pip install '.[gpu-aot]')

Compiles forward and input gradient ahead of time for an H100, for every tile and dtype, and counts
in the machine code what a thread executes in one stage of the pipeline. An adder term is two
instructions in float32, so 2 is the limit; float16 holds two terms in one instruction.
"""

import argparse
import collections
import importlib.util
import json
import os
import re
import tempfile
from functools import partial
from pathlib import Path

# A card as XLA describes it, as far as compiling a kernel asks.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ARITHMETIC = ("FADD", "FFMA", "HADD2", "HFMA2")
LANES = 128  # threads of a kernel


def loops(text: str) -> list[collections.Counter]:
    """Instructions of each loop in a disassembly, by name, the shortest first."""
    found, labels, instructions = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif one := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)(.*)", line):
            instructions.append(one[1])
            target = re.search(r"\.L_x_\d+", one[2])
            if one[1] == "BRA" and target and target[0] in labels:  # backwards
                found.append(instructions[labels[target[0]] :])
    return sorted(map(collections.Counter, found), key=lambda loop: loop.total())


def arithmetic(loop: collections.Counter) -> int:
    """Additions and multiplications in it."""
    return sum(loop[name] for name in ARITHMETIC)


def count(folder: Path, terms: int, trips: int) -> dict:
    """Registers, spilled bytes and instructions a term of the kernel that was dumped last.

    Args:
      folder: of the dumps.
      terms: of a thread in a stage.
      trips: of the inner loop in a stage.
    """
    newest = max(folder.glob("*.sass_ctrl"), key=lambda path: path.stat().st_mtime_ns)
    all_loops = loops(newest.read_text())
    most = max(map(arithmetic, all_loops))
    outer = all_loops[-1]
    inner = next(loop for loop in all_loops if arithmetic(loop) > 0.8 * most)
    executed = inner.total() * trips + (outer.total() - inner.total() if outer != inner else 0)
    notes = newest.with_suffix(".ptxas").read_text()
    return {
        "registers": int(re.search(r"Used (\d+) registers", notes)[1]),
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill", notes))),
        "instructions": executed / terms,
        "inner_loop": dict(inner.most_common()),
    }


def main() -> None:
    """Compiles and prints all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="file for all figures")
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("nvidia")
    tools = [f"{path}/cu13/bin" for path in spec.submodule_search_locations] if spec else []
    os.environ["PATH"] = os.pathsep.join([*tools, os.environ["PATH"]])
    os.environ["JAX_PLATFORMS"] = "cpu"  # the plug-in for GPUs is loaded, and no GPU is looked for
    with tempfile.TemporaryDirectory() as folder:
        for leaf in ("PTX", "SASS"):
            os.environ[f"MOSAIC_GPU_DUMP_{leaf}"] = "1"
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        rows = measure(Path(folder))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


def measure(folder: Path) -> list[dict]:
    """A row a pass, dtype and tile; prints them."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pkkd_jax.ops import geometry as geometry_lib
    from pkkd_jax.ops import gpu, mosaic

    card = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    sharding = SingleDeviceSharding(card.devices[0])
    print(f"jax {jax.__version__}, for an H100")
    print(f"{'':>14} {'dtype':>9} {'tile':>8} {'registers':>9} {'spilled':>7} {'a term':>7}")
    rows = []
    for tile, rates in list(mosaic.TILES.items()):
        mosaic.TILES = {tile: rates}  # so that it is chosen
        channels = tile[1]
        shape_x, shape_w = (256, 8, 8, channels), (3, 3, channels, channels)
        geometry = geometry_lib.resolve(shape_x, shape_w, 1, "SAME", 1, 1, "hardtanh")
        trips = mosaic.block_of(channels) // mosaic.UNROLLED
        terms = tile[0] * tile[1] // LANES * mosaic.block_of(channels)
        for name, dtypes in (
            ("forward", ("float32", "float16")),
            ("input gradient", ("float32",)),
        ):
            for dtype in dtypes:
                x, w = (
                    jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)
                    for shape in (shape_x, shape_w)
                )
                operands = (x, w) if name == "forward" else (x, w, x)
                function = gpu.forward if name == "forward" else gpu.input_gradient
                jax.clear_caches()
                jax.jit(partial(function, geometry=geometry)).lower(*operands).compile()
                found = count(folder, terms, trips)
                rows.append({"pass": name, "dtype": dtype, "tile": tile, **found})
                print(
                    f"{name:>14} {dtype:>9} {tile[0]:>4}x{tile[1]:<3} {found['registers']:>9}"
                    f" {found['spilled']:>7} {found['instructions']:>7.2f}",
                    flush=True,
                )
    return rows


if __name__ == "__main__":
    main()
