"""The adder convolution on this CPU or GPU beside what it can do, XLA and PyTorch.

python benchmarks/adder.py [--peers] [--json FILE] [--repeats 7]

For each instruction set that runs here: the ceilings, which are the kernels' inner loops with data
in the L1 cache, on one and on all threads; and for each layer the rates of forward, dx and dw in
G terms a second, with their share of the roof, max(terms / ceiling, bytes / copy bandwidth). A
layer and its ceilings take turns, since clocks drift; medians are printed. A share above 1 means
that the layer fits into a cache. Then the same layers called one by one, as XLA's convolution, and
with `--peers` (`pip install '.[peers]'`) as PyTorch's, as torch.cdist and as a broadcasting adder.
Compiles `ceilings.cc` with `c++` (or $CXX).

On a Hopper GPU it is `adder_gpu.py`: T terms a second of whole passes and of the kernels in them,
and their share of what additions in registers reach, at 256 images; then plain JAX and the
convolution. There `--repeats` means nothing.
"""

import argparse
import ctypes
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],
}
# batch, height, width, c_in, c_out, size of the filters, stride
LAYERS = [
    (128, 32, 32, 16, 16, 3, 1),
    (128, 16, 16, 32, 32, 3, 1),
    (128, 8, 8, 64, 64, 3, 1),
    (128, 32, 32, 16, 32, 3, 2),
    (128, 32, 32, 16, 32, 1, 2),
    (32, 56, 56, 64, 64, 3, 1),
    (32, 28, 28, 128, 128, 3, 1),
    (32, 14, 14, 256, 256, 3, 1),
    (32, 7, 7, 512, 512, 3, 1),
    (32, 56, 56, 256, 64, 1, 1),
]
# MobileNet's depthwise layers, at which every channel is a group.
DEPTHWISE = [
    (32, 112, 112, 32, 32, 3, 1),
    (32, 56, 56, 128, 128, 3, 1),
    (32, 28, 28, 256, 256, 3, 1),
    (32, 14, 14, 512, 512, 3, 1),
    (32, 7, 7, 1024, 1024, 3, 1),
]
PASSES = ("forward", "dx", "dw")
CEILINGS = {"forward": "forward", "dx": "input_gradient", "dw": "product"}
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
THREADS = len(CPUS) or os.cpu_count() or 1


class Ceilings:
    """The inner loops of one instruction set, and the bandwidth of a copy."""

    def __init__(self, isa: str):
        source = Path(__file__).with_name("ceilings.cc")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "ceilings.so"
            compiler = os.environ.get("CXX", "c++")
            flags = ["-std=c++17", "-O3", "-shared", "-fPIC", *FLAGS[isa]]
            subprocess.run([compiler, *flags, source, "-o", library], check=True)
            self.library = ctypes.CDLL(str(library))
        for name in CEILINGS.values():
            function = getattr(self.library, name)
            function.restype = ctypes.c_double
            function.argtypes = [ctypes.c_long, *[ctypes.c_void_p] * 3]

    def rate(self, which: str, threads: int) -> float:
        """G terms a second of all threads together."""
        function = getattr(self.library, CEILINGS[which])
        buffers = [np.random.randn(3, 1 << 13).astype(np.float32) for _ in range(threads)]

        def work(buffer):
            return function(4000, *(row.ctypes.data for row in buffer))

        return on_threads(work, buffers)

    @staticmethod
    def bandwidth(threads: int) -> float:
        """GB a second, read and written, of copies far larger than the caches."""
        pairs = [np.ones((2, 1 << 24), np.float32) for _ in range(threads)]

        def work(pair):
            np.copyto(pair[0], pair[1])
            return 2.0 * pair[0].nbytes

        return on_threads(work, pairs)


def on_threads(work, items) -> float:
    """1e9 of what `work` returns a second, summed over one thread an item, the best of five."""
    barrier = threading.Barrier(len(items))
    rates: list[list[float]] = [[] for _ in items]

    def run(item, own):
        for _ in range(5):
            barrier.wait()
            begin = time.perf_counter()
            own.append(work(item) / (time.perf_counter() - begin) / 1e9)

    time.sleep(0.002)  # threads of XLA's pool spin for a while after their last task
    threads = [threading.Thread(target=run, args=pair) for pair in zip(items, rates, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return max(sum(together) for together in zip(*rates, strict=True))


def seconds_of(function, least: float = 0.05) -> float:
    """Seconds of one of the calls that `function(calls)` makes, from so many as fill `least` s."""
    calls, seconds = 1, 0.0
    while seconds < least:
        begin = time.perf_counter()
        function(calls)
        seconds = time.perf_counter() - begin
        calls = math.ceil(calls * min(10, 1.2 * least / seconds)) if seconds < least else calls
    return seconds / calls


def shapes(layer, depthwise=False):
    """Shapes of x, w and y, and the terms of one pass."""
    n, h, w, c_in, c_out, size, stride = layer
    y = (n, -(-h // stride), -(-w // stride), c_out)
    per_group = 1 if depthwise else c_in
    terms = math.prod(y) * size * size * per_group
    return (n, h, w, c_in), (size, size, per_group, c_out), y, terms


def title(layer, depthwise=False) -> str:
    """A short name."""
    n, h, _, c_in, c_out, size, stride = layer
    text = f"{n} x {h}x{h} {c_in}->{c_out} {size}x{size}"
    return text + (" /2" if stride == 2 else "") + (" depthwise" if depthwise else "")


def operands(layer, depthwise=False) -> tuple:
    """x, w and dy from N(0, 1)."""
    import jax

    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, s) for k, s in zip(keys, shapes(layer, depthwise)[:3], strict=True)
    )


def jax_functions(layer, adder: bool, depthwise=False) -> dict:
    """The three passes as functions of x, w and dy."""
    import jax
    from jax import lax

    from pkkd_jax.ops.adder import adder_conv

    x_shape, w_shape, _, _ = shapes(layer, depthwise)
    strides, groups = (layer[6],) * 2, x_shape[3] // w_shape[2]

    def convolution(x, w):
        if adder:
            return adder_conv(x, w, strides=strides, feature_group_count=groups)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, strides, "SAME", dimension_numbers=dimensions, feature_group_count=groups
        )

    return {
        "forward": lambda x, w, dy: convolution(x, w),
        "dx": lambda x, w, dy: jax.vjp(lambda x: convolution(x, w), x)[1](dy)[0],
        "dw": lambda x, w, dy: jax.vjp(lambda w: convolution(x, w), w)[1](dy)[0],
    }


def jax_passes(layer, adder: bool, depthwise=False, one_program=False) -> dict:
    """The three passes as functions of the number of calls.

    In one program the buffers of all calls are mapped once, as they are in a training step; XLA's
    own convolution is slow within a loop, and so is measured call by call.
    """
    import jax
    from jax import lax

    x, w, dy = operands(layer, depthwise)
    passes = jax_functions(layer, adder, depthwise)

    def called(one):
        jitted = jax.jit(one)

        def run(calls):
            for _ in range(calls):
                jax.block_until_ready(jitted(x, w, dy))

        return run

    def repeated(one):
        @jax.jit
        def run(calls, x, w, dy):
            def again(_, last):  # filters that depend on the last call: no call can be left out
                return one(x, w + 1e-30 * last, dy)[(0,) * 4]

            return lax.fori_loop(0, calls, again, 0.0)

        return lambda calls: jax.block_until_ready(run(calls, x, w, dy))

    return {name: (repeated if one_program else called)(one) for name, one in passes.items()}


def kernels(isa: str, repeats: int) -> dict:
    """Ceilings and layers of one instruction set, which PKKD_JAX_ADDER must name."""
    from pkkd_jax.ops import adder

    adder.implementation("cpu")  # raises where it cannot run
    ceilings = Ceilings(isa)
    threads = len(os.sched_getaffinity(0)) if CPUS else THREADS
    found = {
        "threads": {
            name: {str(t): ceilings.rate(name, t) for t in sorted({1, threads})} for name in PASSES
        },
        "bandwidth": Ceilings.bandwidth(threads),
        "layers": {},
    }
    for layer, depthwise in [*((a, False) for a in LAYERS), *((a, True) for a in DEPTHWISE)]:
        x, w, y, terms = shapes(layer, depthwise)
        sizes = [4e-9 * math.prod(s) for s in (x, w, y)]
        moved = {"forward": sum(sizes), "dx": sum(sizes) + sizes[0], "dw": sum(sizes) + sizes[1]}
        passes, row = jax_passes(layer, True, depthwise, one_program=True), {}
        for function in passes.values():
            function(1)
        for name, function in passes.items():
            pairs = [(seconds_of(function), ceilings.rate(name, threads)) for _ in range(repeats)]
            bandwidth = Ceilings.bandwidth(threads)
            row[name] = {
                "rate": statistics.median(terms / 1e9 / s for s, _ in pairs),
                "share": statistics.median(
                    max(terms / 1e9 / peak, moved[name] / bandwidth) / s for s, peak in pairs
                ),
                "by_memory": moved[name] / bandwidth > terms / 1e9 / pairs[0][1],
            }
        found["layers"][title(layer, depthwise)] = row
    return found


def in_process(isa: str, repeats: int, cpus: int = THREADS) -> dict:
    """`kernels` in a new process on the first `cpus` processors; raises RuntimeError."""
    environment = dict(os.environ, PKKD_JAX_ADDER=isa, JAX_PLATFORMS="cpu", XLA_FLAGS="")
    command = [sys.executable, __file__, "--isa", isa, "--repeats", str(repeats)]
    done = subprocess.run(
        [*command, "--cpus", str(cpus)], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def print_scaling(one: dict, all_cpus: dict) -> None:
    """How much faster all threads are than one, over the layers that are not depthwise."""
    print(f"\n{THREADS} threads over one:")
    for which in PASSES:
        ratios = [
            all_cpus["layers"][layer][which]["rate"] / row[which]["rate"]
            for layer, row in one["layers"].items()
            if "depthwise" not in layer
        ]
        print(f"  {which:>8}: {geometric_mean(ratios):.2f}, least {min(ratios):.2f}")


def torch_passes(layer) -> dict:
    """Names of peers to their passes: convolution in both layouts, cdist and broadcasting."""
    import torch
    from torch.nn import functional

    (n, h, width, c_in), (size, _, _, c_out), y_shape, _ = shapes(layer)
    stride, padding = (layer[6],) * 2, (size // 2,) * 2
    found = {}
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels last", torch.channels_last),
    ):
        x = torch.randn(n, c_in, h, width).to(memory_format=layout)
        w = torch.randn(c_out, c_in, size, size).to(memory_format=layout)
        dy = torch.randn(n, c_out, *y_shape[1:3]).to(memory_format=layout)

        def backward(mask, x=x, w=w, dy=dy):
            return torch.ops.aten.convolution_backward(
                dy, x, w, None, stride, padding, (1, 1), False, (0, 0), 1, mask
            )

        found[f"convolution, {name}"] = {
            "forward": lambda x=x, w=w: functional.conv2d(x, w, None, stride, padding),
            "dx": lambda f=backward: f((True, False, False)),
            "dw": lambda f=backward: f((False, True, False)),
        }
    x, w = torch.randn(n, c_in, h, width), torch.randn(c_out, c_in * size * size)

    def patches():
        columns = functional.unfold(x, size, 1, padding, stride)
        return columns.transpose(1, 2).reshape(-1, w.shape[1])

    def broadcasting():
        columns = patches()
        # Filter by filter: all at once would take gigabytes.
        return torch.stack([-(columns - f).abs().sum(1) for f in w], 1)

    found["cdist"] = {"forward": lambda: -torch.cdist(patches(), w, p=1)}
    found["broadcasting adder"] = {"forward": broadcasting}

    def repeated(one):
        def run(calls):
            for _ in range(calls):
                one()

        return run

    return {n: {p: repeated(f) for p, f in passes.items()} for n, passes in found.items()}


def geometric_mean(values) -> float:
    """Of positive numbers."""
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def print_kernels(isa: str, found: dict) -> None:
    """The tables of one instruction set."""
    print(f"\n{isa}: ceilings in G terms/s; copy bandwidth {found['bandwidth']:.1f} GB/s")
    for name, by_threads in found["threads"].items():
        rates = ", ".join(f"{rate:.1f} on {threads}" for threads, rate in by_threads.items())
        print(f"  {name:>8}: {rates} threads")
    print(f"{'':>34}" + "".join(f"{name:>9} {'share':>6}  " for name in PASSES))
    for layer, row in found["layers"].items():
        cells = (
            f"{row[n]['rate']:>9.1f} {row[n]['share']:>6.2f}{'m' if row[n]['by_memory'] else ' '} "
            for n in PASSES
        )
        print(f"{layer:>34}" + "".join(cells))
    plain = [row for layer, row in found["layers"].items() if "depthwise" not in layer]
    for what, summary in (("geometric mean", geometric_mean), ("least", min)):
        cells = (f"{'':>9} {summary(row[n]['share'] for row in plain):>6.2f}  " for n in PASSES)
        print(f"{what + ' without depthwise':>34}" + "".join(cells))
    print("m: the roof is the memory's")


def main() -> None:
    """Runs everything, or one instruction set for itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", action="store_true", help="PyTorch too")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--isa", choices=FLAGS, help=argparse.SUPPRESS)
    parser.add_argument("--cpus", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.isa:
        if CPUS:
            os.sched_setaffinity(0, CPUS[: arguments.cpus])
        print(json.dumps(kernels(arguments.isa, arguments.repeats)))
        return
    import jax

    if jax.default_backend() == "gpu":
        import adder_gpu

        if arguments.peers:
            parser.error("--peers: PyTorch is measured on CPUs only; leave it out here")
        result = adder_gpu.measure()
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(result, indent=1))
        return
    print(f"{THREADS} cores, jax {jax.__version__}, medians of {arguments.repeats}")
    result: dict = {"kernels": {}, "peers": {}}
    for isa in FLAGS:
        try:
            result["kernels"][isa] = in_process(isa, arguments.repeats)
        except RuntimeError as error:
            print(f"\n{isa}: {error}")
            continue
        print_kernels(isa, result["kernels"][isa])
    isa, found = next(iter(result["kernels"].items()))
    if CPUS:  # or a process cannot be kept to some
        result["one_thread"] = in_process(isa, arguments.repeats, 1)
        print_scaling(result["one_thread"], found)
    print(f"\nCall by call: seconds of the adder ({isa}) over those of others, and rates")
    ratios = []
    if arguments.peers:
        import torch

        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for layer in LAYERS:
        terms, name = shapes(layer)[3], title(layer)
        others = {"adder": jax_passes(layer, True), "XLA's convolution": jax_passes(layer, False)}
        if arguments.peers:
            others |= torch_passes(layer)
        rates = {}
        for other, passes in others.items():
            rates[other] = {}
            for which, function in passes.items():
                function(1)
                times = [seconds_of(function) for _ in range(1 + (terms < 4e8) * 2)]
                rates[other][which] = terms / 1e9 / statistics.median(times)
        result["peers"][name] = rates
        print(name)
        ours = rates["adder"]
        for other, by_pass in rates.items():
            cells = "  ".join(f"{p} {rate:.1f}" for p, rate in by_pass.items())
            ratio = sum(1 / ours[p] for p in by_pass) / sum(1 / r for r in by_pass.values())
            print(f"{other:>30}: {ratio:>5.2f}   G terms/s: {cells}")
        if layer[5] == 3:
            theirs = rates["XLA's convolution"].values()
            ratios.append(sum(1 / r for r in ours.values()) / sum(1 / r for r in theirs))
    print(
        "\nadder / XLA's convolution, forward + dx + dw, 3x3 layers:"
        f" mean {statistics.mean(ratios):.2f}, largest {max(ratios):.2f}"
    )
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
