"""Optimisers and schedules; adder filters get the adaptive learning rate of AdderNet."""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from pkkd_jax.names import UserError, unknown


def is_adder_filter(path) -> bool:
    """Whether a parameter's path ends in `filters`, the name that AdderConv gives its own."""
    return bool(path) and getattr(path[-1], "key", None) == "filters"


def scale_by_adder_norm(eta: float = 0.2) -> optax.GradientTransformation:
    """Normalises each adder filter's gradient: the adaptive learning rate of adder networks.

        g <- g * eta * sqrt(k) / max(||g||_2, 1e-12),   k = number of elements of the filter

    It touches parameters named `filters` only. It must see the mean gradient over devices and
    accumulated micro-batches, and stand before weight decay and momentum.

    Args:
      eta: the norm of a scaled gradient is `eta * sqrt(k)`.
    References:
      Chen et al., AdderNet, CVPR 2020, Eq. 13.
    """

    def scale(path, g):
        if not is_adder_filter(path):
            return g
        norm = jnp.maximum(jnp.linalg.norm(g.astype(jnp.float32).ravel()), 1e-12)
        return (g * (eta * g.size**0.5 / norm)).astype(g.dtype)

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))


def schedule(
    name: str, learning_rate: float, total_steps: int, warmup_steps: int = 0, cycles: int = 1
) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a cosine to zero or a constant.

    With several cycles all of it starts again after every `total_steps // cycles` steps.

    References:
      Loshchilov and Hutter, SGDR, ICLR 2017, Eq. 5, without the growth of the cycles.
    """
    if cycles > 1:
        one = schedule(name, learning_rate, total_steps // cycles, warmup_steps)
        last = (cycles - 1) * (total_steps // cycles)  # what does not divide prolongs the last one
        return lambda step: one(jnp.where(step < last, step % (total_steps // cycles), step - last))
    rest = max(1, total_steps - warmup_steps)
    kinds = {
        "cosine": lambda: optax.cosine_decay_schedule(learning_rate, rest),
        "constant": lambda: optax.constant_schedule(learning_rate),
    }
    if name not in kinds:
        raise unknown("schedule", name, kinds)
    if warmup_steps == 0:
        return kinds[name]()
    warmup = optax.linear_schedule(0.0, learning_rate, warmup_steps)
    return optax.join_schedules([warmup, kinds[name]()], [warmup_steps])


def optimiser(name: str) -> Callable[..., optax.GradientTransformation]:
    """The function of optax called `name`, of those that take a `learning_rate` first.

    Raises:
      UserError: if there is no such function; the message has the nearest right name.
    """
    found = {
        key
        for key, value in vars(optax).items()
        if inspect.isfunction(value)
        and not key.startswith("_")
        and next(iter(inspect.signature(value).parameters), None) == "learning_rate"
    }
    if name not in found:
        raise unknown("optimiser", name, found)
    return getattr(optax, name)


def build(
    total_steps: int,
    *,
    name: str = "sgd",
    learning_rate: float = 0.1,
    schedule_name: str = "cosine",
    cycles: int = 1,
    warmup_steps: int = 0,
    weight_decay: float = 5e-4,
    adder_eta: float = 0.2,
    **arguments,
) -> optax.GradientTransformation:
    """Any optax optimiser behind the adder scaling, with weight decay on every parameter.

    Args:
      total_steps: length of the schedule.
      name: of a function of optax that takes `learning_rate`: "sgd", "adamw", "lion", ...
      learning_rate: peak of the schedule.
      schedule_name: "cosine" or "constant".
      cycles: how often the schedule is gone through.
      warmup_steps: of linear increase from zero.
      weight_decay: passed to an optimiser that has its own, such as "adamw"; times the parameter
        added to the gradient (L2) for the others.
      adder_eta: of `scale_by_adder_norm`; 0 leaves it out.
      **arguments: for the optax function, `momentum=0.9` for example.
    Raises:
      UserError: for an unknown optimiser, schedule or argument.
    """
    function = optimiser(name)
    allowed = inspect.signature(function).parameters
    for key in arguments:
        if key not in allowed:
            raise unknown(f"argument of optimiser {name!r}:", key, allowed)
    if learning_rate < 0:
        raise UserError(f"{learning_rate=}: it must be 0 or above, for example 0.1")
    parts = [scale_by_adder_norm(adder_eta)] if adder_eta else []
    if "weight_decay" in allowed:
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        parts.append(optax.add_decayed_weights(weight_decay))
    rate = schedule(schedule_name, learning_rate, total_steps, warmup_steps, cycles)
    found = optax.chain(*parts, function(rate, **arguments))
    tree = {"kernel": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        jax.eval_shape(lambda g: found.update(g, found.init(g), g), tree)
    except TypeError as error:
        raise UserError(
            f"optimiser {name!r} wants more than gradients ({error}): choose another, such as 'sgd'"
        ) from error
    return found
