"""The network of a configuration with ordinary, adder and one-bit convolutions."""

from collections.abc import Mapping, Sequence
from typing import Any

from pkkd_jax import models
from pkkd_jax.cost.figures import Cost
from pkkd_jax.cost.trace import count

TWINS = {"cnn": "conv", "ann": "adder", "bnn": "binary"}


def twins(arguments: Mapping[str, Any], image_shape: Sequence[int]) -> dict[str, Cost]:
    """Counts a network and its twins, which differ from it in their convolution only.

    Args:
      arguments: keywords of `models.build`.
      image_shape: `(height, width, channels)`.
    Returns:
      "cnn", "ann" and "bnn", and "student" if the network's own convolution is that of none.
    Raises:
      UserError: if there is no such network, or it does not take such images.
    """
    convolutions = dict(TWINS)
    if arguments.get("conv", "conv") not in TWINS.values():
        convolutions["student"] = arguments["conv"]
    return {
        name: count(models.build(**{**arguments, "conv": conv}), image_shape)
        for name, conv in convolutions.items()
    }
