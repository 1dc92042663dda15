"""Distillation losses, one file each: a pair of functions in optax's manner.

A user's own loss is the dotted path of a function that returns a `Distiller`.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

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
      stages: `(params, student: Outputs, teacher: Outputs) -> stages`, for analysis: what `apply`
        makes of the responses on its way, as stage -> "student" or "teacher" -> the student's name
        of the tap -> array; None where it compares outputs as they are.
    """

    init: Callable[..., Any]
    apply: Callable[..., Any]
    stages: Callable[..., dict] | None = None


def gather(x: jax.Array, axis_name: str | None) -> jax.Array:
    """The examples of all devices, `[global batch, ...]`, for losses that compare them."""
    return x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)


def unit(x: jax.Array) -> jax.Array:
    """`x` brought to length 1 along its last axis; 0, and its gradient too, where it is 0."""
    return x * lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def rows(features: jax.Array, axis_name: str | None) -> jax.Array:
    """float32 `[global batch, ...]`: the features of each example of all devices as one vector."""
    return gather(features.astype(jnp.float32).reshape(len(features), -1), axis_name)


# What stands beside a loss's own keywords in `config.distill`.
WEIGHT = {"weight": 1.0, "weight_schedule": "constant", "final_weight": 0.0}
# Those that are not 1: the best of some decades beside a fixed teacher, of which
# experiments/ABLATIONS.md has all.
DEFAULT_WEIGHTS = {
    "fitnets": 10.0,
    "attention_transfer": 10.0,
    "similarity_preserving": 3000.0,
    "fsp": 0.001,
    "relational": 0.1,
    "pkt": 100.0,
    "correlation_congruence": 100.0,
}


def schedule(
    total_steps: int,
    weight: float,
    weight_schedule: str = "constant",
    final_weight: float = 0.0,
) -> float | optax.Schedule:
    """Weight of a loss, by step unless it is constant.

    Args:
      total_steps: of the training.
      weight: at the start.
      weight_schedule: "constant", or "linear", "cosine" or "exponential" (as many steps for each
        decade) from `weight` to `final_weight`.
      final_weight: at the end of those three.
    Raises:
      UserError: for an unknown schedule, the message has the nearest right one; for a weight below
        0; for a final weight that a constant does not reach; or for an exponential from or to 0.
    """
    for name, value in (("weight", weight), ("final_weight", final_weight)):
        if value < 0:
            raise names.UserError(f"{name}={value} of a loss: it must be 0 (off) or more")
    decays = {  # from 1 to 0
        "linear": optax.linear_schedule(1.0, 0.0, total_steps),
        "cosine": optax.cosine_decay_schedule(1.0, total_steps),
    }
    if weight_schedule in decays:
        return lambda step: final_weight + (weight - final_weight) * decays[weight_schedule](step)
    if weight_schedule == "exponential":
        if not (weight > 0 and final_weight > 0):
            raise names.UserError(
                f"{weight=} and {final_weight=} with weight_schedule='exponential': both must be"
                " above 0, for example 10.0 and 0.1"
            )
        return optax.exponential_decay(weight, total_steps, final_weight / weight)
    if weight_schedule != "constant":
        known = ("constant", *decays, "exponential")
        raise names.unknown("weight_schedule", weight_schedule, known)
    if final_weight:
        raise names.UserError(
            f"{final_weight=} with weight_schedule='constant': choose 'linear', 'cosine' or"
            " 'exponential'"
        )
    return weight


def named(losses: Mapping[str, Any], module: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields name and keywords of each loss of `config.distill`.

    A dict without a weight is a module, the first part of a dotted name.

    Raises:
      UserError: when it comes to what is no loss.
    """
    for key, arguments in losses.items():
        name = module + key
        if not isinstance(arguments, Mapping) or not arguments:
            raise names.UserError(
                f"config.distill.{name}={arguments!r}: a loss has a weight, for example"
                " {'weight': 1.0}, beside its own keywords"
            )
        if "weight" in arguments:
            yield name, arguments
        else:
            yield from named(arguments, f"{name}.")


def build(
    losses: Mapping[str, Any], total_steps: int
) -> dict[str, tuple[float | optax.Schedule, Distiller]]:
    """Builds `config.distill`: maps each name to its weight or that by step, and its `Distiller`.

    Raises:
      UserError: for an unknown loss or keyword; the message has the nearest right one.
    """
    built: dict[str, tuple[float | optax.Schedule, Distiller]] = {}
    for name, arguments in named(losses):
        weight = schedule(total_steps, **{k: v for k, v in arguments.items() if k in WEIGHT})
        keywords = {key: value for key, value in arguments.items() if key not in WEIGHT}
        built[name] = weight, names.call("pkkd_jax.distill", name, "loss", **keywords)
    return built
