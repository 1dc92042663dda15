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
import json
from pathlib import Path

import jax


def main() -> None:
    """Measures what this machine has."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", action="store_true", help="PyTorch too")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    if jax.default_backend() == "gpu":
        import adder_gpu

        if arguments.peers:
            parser.error("--peers: PyTorch is measured on CPUs only; leave it out here")
        result = adder_gpu.measure()
    else:
        import adder_cpu

        result = adder_cpu.measure(arguments.repeats, arguments.peers)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
