"""Distillation losses, one file each: a pair of functions in optax's manner.

A user's own loss is the dotted path of a function that returns a `Distiller`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pkkd_jax import names


class Distiller(NamedTuple):
    """A distillation loss.

    Attributes:
      init: `(key, student: Outputs, teacher: Outputs) -> params`, the learnable parts, `{}` if
        none; called once, on the outputs for the first training examples.
      apply: `(params, student: Outputs, teacher: Outputs, axis_name) -> (loss, metrics)`. `loss` is
        a float32 scalar, the mean over this device's examples; `metrics` maps names to scalars to
        be logged, the loss itself among them. The teacher's outputs are constants. What compares
        examples with each other gathers them over `axis_name` first.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]


def build(losses: Mapping[str, Any], module: str = "") -> dict[str, tuple[float, Distiller]]:
    """Builds `config.distill`: maps each name to its weight and its `Distiller`.

    A dict without a weight is a module, the first part of a dotted name.

    Raises:
      UserError: for an unknown loss or keyword; the message has the nearest right one.
    """
    built: dict[str, tuple[float, Distiller]] = {}
    for key, arguments in losses.items():
        name = module + key
        if "weight" not in arguments:
            built |= build(arguments, f"{name}.")
            continue
        keywords = {key: value for key, value in arguments.items() if key != "weight"}
        distiller = names.call("pkkd_jax.distill", name, "loss", **keywords)
        built[name] = arguments["weight"], distiller
    return built
