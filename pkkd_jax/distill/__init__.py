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


def build(losses: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, Distiller]]:
    """Builds `config.distill`: maps each name to its weight and its `Distiller`.

    Raises:
      UserError: for an unknown loss or keyword; the message has the nearest right one.
    """
    return {
        name: (
            arguments["weight"],
            names.call(
                "pkkd_jax.distill",
                name,
                "loss",
                **{key: value for key, value in arguments.items() if key != "weight"},
            ),
        )
        for name, arguments in losses.items()
    }
