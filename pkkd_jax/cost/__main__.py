"""Prints what one image costs the student of a configuration and its twins, by layer.

python -m pkkd_jax.cost --config=configs/NAME.py[:ARG] --config.any.leaf=value
    [--json] [--precision=float32|float16|int32|int8] [--layers_only]

The twins are the same network with ordinary, adder and one-bit convolutions. Nothing is trained,
and the data set need not be there. --layers_only leaves out what is no convolution or product.
"""

import os

# Before JAX starts: its CPU client's notices are not for users, and a trace needs no accelerator.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import json
import sys

from absl import flags

from pkkd_jax import command, cost, data, names, runs
from pkkd_jax import config as config_lib

USAGE = "python -m pkkd_jax.cost --config=configs/resnet18.py [--json] [--config.LEAF=VALUE]"


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)
    flags.DEFINE_string("precision", "float32", "Of the arithmetic.", flag_values=values)
    flags.DEFINE_bool("layers_only", False, "Leave the rest out.", flag_values=values)


def _heading(arguments: dict, image_shape: tuple[int, ...]) -> str:
    leaves = {k: v for k, v in arguments.items() if k not in ("name", "conv")}
    network = f"{arguments['name']}({', '.join(f'{k}={v!r}' for k, v in leaves.items())})"
    return f"{network}, one image of {'x'.join(map(str, image_shape))}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    argv = sys.argv if argv is None else argv
    try:
        config, given, _ = command.parse(argv, _define, USAGE, __doc__)
        plain = config_lib.to_json(config)
        source = data.open_source("train", **plain["data"])
        plain["num_classes"] = source.num_classes
        arguments = runs.network_arguments(plain, "student")
        costs = cost.twins(arguments, source.image_shape)
        how = given.precision, given.layers_only
        text = f"{_heading(arguments, source.image_shape)}\n\n{cost.text(costs, *how)}"
        print(json.dumps(cost.to_json(costs, *how)) if given.json else text, flush=True)
        return 0
    except BrokenPipeError:  # its reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except names.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
