"""How primitives are made: rules per platform, batching, and the portable form in exports.

A primitive, and not `lax.platform_dependent`, because one exported program must serve several
platforms, and because the process that lowers need not have the device.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from pkkd_jax.ops.geometry import varying_axes

Rule = Callable[..., jax.Array]


def define(name: str, rules: Mapping[str | None, Rule], aval: Callable, filters: int) -> Primitive:
    """Makes the primitive `name` of a convolution or of one of its gradients.

    Args:
      name: what a jaxpr shows.
      rules: platform to `(*operands, **parameters) -> array`, traced by JAX. `None` serves each
        platform that has no line of its own, and every export: a custom kernel's call is not
        stable enough to be stored. It serves accelerators too where XLA is to split a program over
        devices by itself, which it cannot with a kernel.
      aval: abstract operands and parameters to the abstract result, whose dtype the rules' results
        are cast to.
      filters: index of the filters among the operands; -1 where they are the result.
    """
    primitive = Primitive(name)

    def cast(rule):
        @functools.wraps(rule)
        def like_result(*operands, **parameters):
            dtype = aval(*map(jax.typeof, operands), **parameters).dtype
            return rule(*operands, **parameters).astype(dtype)

        return mlir.lower_fun(like_result, multiple_results=False)

    portable = cast(rules[None])

    def stored_or(lowering, platform):
        def choose(context, *operands, **parameters):
            plain = context.module_context.lowering_parameters.for_export
            plain |= platform != "cpu" and _partitioned(context.module_context.axis_context)
            return (portable if plain else lowering)(context, *operands, **parameters)

        return choose

    primitive.def_abstract_eval(aval)
    primitive.def_impl(functools.partial(_evaluate, primitive))
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive, filters)
    for platform, rule in rules.items():
        mlir.register_lowering(primitive, stored_or(cast(rule), platform), platform=platform)
    return primitive


def _partitioned(axis_context) -> bool:
    """Whether XLA splits the program over devices, but for what shard_map does by hand."""
    if hasattr(axis_context, "num_devices"):
        return axis_context.num_devices != 1
    manual = set(getattr(axis_context, "manual_axes", ()))
    if not manual:
        return False
    mesh = axis_context.mesh
    return manual | set(mesh.manual_axes) != set(mesh.axis_names)


def vary_together(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Casts arrays to the union of the mesh axes over which they vary inside shard_map."""
    axes = [varying_axes(a) for a in arrays]
    union = frozenset().union(*axes)
    return tuple(
        lax.pcast(a, tuple(union - own), to="varying") if union - own else a
        for a, own in zip(arrays, axes, strict=True)
    )


def mean_over(axis_name: str | None, value):
    """The mean of `value` over the devices of an axis; `value` itself without one."""
    return value if axis_name is None else lax.pmean(value, axis_name)


@functools.cache
def compiled(primitive: Primitive, parameters: tuple) -> Callable:
    """A primitive bound to its parameters, for calls outside of any program."""
    return jax.jit(functools.partial(primitive.bind, **dict(parameters)))


def _evaluate(primitive, *operands, **parameters):
    with jax.disable_jit(False):  # under disable_jit the call would come back here for ever
        return compiled(primitive, tuple(parameters.items()))(*operands)


def _batch(primitive, filters: int, operands, axes, *, geometry, **parameters):
    """Folds a vmapped axis into the images if the filters are shared, else into the groups."""
    size = next(a.shape[d] for a, d in zip(operands, axes, strict=True) if d is not None)
    shared = filters >= 0 and axes[filters] is None
    target = 0 if shared else 3

    def fold(array, axis):
        # A gradient's images and filters must be as many as its cotangent's: broadcast.
        array = (
            jnp.broadcast_to(array[None], (size, *array.shape))
            if axis is None
            else jnp.moveaxis(array, axis, 0)
        )
        array = jnp.moveaxis(array, 0, target)
        return array.reshape(*array.shape[:target], -1, *array.shape[target + 2 :])

    folded = [
        array if shared and index == filters else fold(array, axis)
        for index, (array, axis) in enumerate(zip(operands, axes, strict=True))
    ]
    if not shared:
        geometry = dataclasses.replace(geometry, groups=geometry.groups * size)
    if "shape" in parameters:
        shape = list(parameters["shape"])
        shape[target] *= size
        parameters["shape"] = tuple(shape)
    result = primitive.bind(*folded, geometry=geometry, **parameters)
    split = (*result.shape[:target], size, -1, *result.shape[target + 1 :])
    return result.reshape(split), target
