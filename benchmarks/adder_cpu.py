"""The part of adder.py for CPUs: ceilings, the kernels beside them, and the peers.

`python benchmarks/adder_cpu.py ISA REPEATS THREADS` prints those of one instruction set as JSON.
"""

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

import jax
import numpy as np
from jax import lax
from layers import DEPTHWISE, LAYERS, PASSES, jax_functions, operands, shapes, title

from pkkd_jax.ops import adder

FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "neon": [],
}
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


def jax_passes(layer, adder: bool, depthwise=False, one_program=False) -> dict:
    """The three passes as functions of the number of calls.

    In one program the buffers of all calls are mapped once, as they are in a training step; XLA's
    own convolution is slow within a loop, and so is measured call by call.
    """
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
    command = [sys.executable, __file__, isa, str(repeats), str(cpus)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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


def measure(repeats: int, peers: bool) -> dict:
    """Prints the tables of every instruction set and of the peers; returns all figures."""
    print(f"{THREADS} cores, jax {jax.__version__}, medians of {repeats}")
    result: dict = {"kernels": {}, "peers": {}}
    for isa in FLAGS:
        try:
            result["kernels"][isa] = in_process(isa, repeats)
        except RuntimeError as error:
            print(f"\n{isa}: {error}")
            continue
        print_kernels(isa, result["kernels"][isa])
    isa, found = next(iter(result["kernels"].items()))
    if CPUS:  # or a process cannot be kept to some
        result["one_thread"] = in_process(isa, repeats, 1)
        print_scaling(result["one_thread"], found)
    print(f"\nCall by call: seconds of the adder ({isa}) over those of others, and rates")
    ratios = []
    if peers:
        import adder_torch
        import torch

        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
    for layer in LAYERS:
        terms, name = shapes(layer)[3], title(layer)
        others = {"adder": jax_passes(layer, True), "XLA's convolution": jax_passes(layer, False)}
        if peers:
            others |= adder_torch.torch_passes(layer)
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
    return result


if __name__ == "__main__":
    if CPUS:
        os.sched_setaffinity(0, CPUS[: int(sys.argv[3])])
    print(json.dumps(kernels(sys.argv[1], int(sys.argv[2]))))
