"""Instruction bundles of the kernels for TPUs, without a TPU.

python benchmarks/tpu_bundles.py [--chips v5e,v6e] [--json FILE]     (pip install '.[tpu-aot]')

Compiles forward and input gradient of layers of ResNets ahead of time and counts the bundles that
one tile executes, beside the least that its arithmetic takes: four vector instructions go into a
bundle, and a register's worth of terms is two of them forward (take the maximum, add) and four in
the input gradient (subtract, clamp, multiply, add).
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# batch, size of the image, c_in, c_out, size of the filters, stride
LAYERS = [
    (128, 32, 16, 16, 3, 1),
    (128, 32, 16, 32, 3, 2),
    (128, 16, 32, 32, 3, 1),
    (128, 8, 64, 64, 3, 1),
    (128, 56, 64, 64, 3, 1),
    (128, 28, 128, 128, 3, 1),
    (128, 14, 256, 256, 3, 1),
    (128, 14, 512, 512, 3, 2),
    (128, 7, 512, 512, 3, 1),
    (128, 14, 1024, 256, 1, 1),
]
OPERATIONS = {"forward": 2, "input gradient": 4}
ISSUED = 4  # vector instructions of a bundle


def bundles(text: str) -> tuple[int, int]:
    """Bundles inside of the loops over terms, and around them, of a disassembled kernel."""
    depths = [
        len(found[1])
        for line in text.splitlines()
        if (found := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(>*)", line))
    ]
    return sum(depth > 1 for depth in depths), sum(depth <= 1 for depth in depths)


def measure(folder: str, chip: str, layer, which: str) -> dict:
    """Compiles one layer in this process, which dumps into `folder`, and counts its bundles."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from pkkd_jax.ops import geometry as geometry_lib
    from pkkd_jax.ops import tpu

    n, size, c_in, c_out, taps, stride = layer
    devices = topologies.get_topology_desc(f"{chip}:2x2", platform="tpu").devices
    sharding = SingleDeviceSharding(devices[0])

    def operand(shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    shape_x, shape_w = (n, size, size, c_in), (taps, taps, c_in, c_out)
    geometry = geometry_lib.resolve(shape_x, shape_w, stride, "SAME", 1, 1, "hardtanh")
    x, w, dy = map(operand, (shape_x, shape_w, geometry.output_shape(shape_x, shape_w)))
    forward = which == "forward"
    function = tpu.forward if forward else tpu.input_gradient
    operands = (x, w) if forward else (x, w, dy)
    jax.jit(lambda *a: function(*a, geometry)).lower(*operands).compile()
    (kernel,) = (
        path
        for path in Path(folder).glob(f"*-{tpu.NAME}*-final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    inner, outer = bundles(kernel.read_text())
    terms, channels = (c_in, c_out) if forward else (c_out, c_in)
    strides, columns = (geometry.strides, dy.shape[2]) if forward else ((1, 1), size)
    seen = (taps, taps, terms, channels), columns, n, strides, (1, 1), not forward
    tiling = tpu.tiling(*seen)
    steps = taps * math.ceil(terms / tiling.block)
    executed = inner * steps + outer
    registers = tiling.rows * tiling.width // (tpu.SUBLANES * tpu.LANES)
    least = taps * steps * tiling.block * registers * OPERATIONS[which] / ISSUED
    return {"executed": executed, "least": least, "tile": tiling[:2]}


def in_process(chip: str, layer, which: str) -> dict:
    """`measure` in a new process: where the compiler writes to is an argument of its start."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(
            os.environ,
            JAX_PLATFORMS="cpu",  # the compiler is loaded, and no TPU is looked for
            TPU_SKIP_MDS_QUERY="1",
            LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
        )
        case = json.dumps([folder, chip, layer, which])
        command = [sys.executable, __file__, "--case", case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {chip}, {layer}, {which}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Compiles and prints all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--chips", default="v5e,v6e")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*json.loads(arguments.case))))
        return
    rows = []
    print(f"{'':>4} {'layer':>26} {'':>14} {'tile':>8} {'bundles':>8} {'least':>8} {'share':>6}")
    for chip in arguments.chips.split(","):
        for layer in LAYERS:
            n, size, c_in, c_out, taps, stride = layer
            title = f"{n}x{size}x{size} {c_in}->{c_out} {taps}x{taps}" + " /2" * (stride == 2)
            for which in OPERATIONS:
                if stride > 1 and which != "forward":
                    continue  # several kernels, one a phase
                found = in_process(chip, layer, which)
                share = found["least"] / found["executed"]
                rows.append({"chip": chip, "layer": layer, "pass": which, **found, "share": share})
                tile = "x".join(map(str, found["tile"]))
                print(
                    f"{chip:>4} {title:>26} {which:>14} {tile:>8} {found['executed']:>8}"
                    f" {found['least']:>8.0f} {share:>6.2f}",
                    flush=True,
                )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
