"""Counting in the trace of a network."""

import collections
import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen
from jax.extend.core import Literal

from pkkd_jax.cost import primitives
from pkkd_jax.cost.figures import COLUMNS, Cost, Layer, Operations
from pkkd_jax.nn import Outputs

# Equations that hold another trace, in which everything is counted as if it stood here.
CALLS = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit",
    "remat", "remat2",
}  # fmt: skip
MARK, NORM = "pkkd_jax.cost:", "pkkd_jax.cost.norm:"


def count(model: linen.Module, image_shape: Sequence[int]) -> Cost:
    """Counts what one image costs `model` at inference, in the trace of it.

    Only what depends on the image counts: what is computed of variables alone is a constant of the
    deployed network. So does only what the logits need, if `model` returns `Outputs`. A
    scan counts as often as it runs, and a condition by its dearest branch. What cannot be counted,
    such as a loop of unknown length, is named in `not_counted`. What `linen.jit` holds is in the
    totals, but may stand in another layer or column.

    Args:
      model: called as `model.apply(variables, images, train=False)`.
      image_shape: `(height, width, channels)`.
    Returns:
      The cost, a `Layer` for each module in which a convolution or a matrix product stands.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    def forward(variables, images):
        with linen.intercept_methods(_mark):
            outputs = model.apply(variables, images, train=False)
        return outputs.logits if isinstance(outputs, Outputs) else outputs

    trace = jax.make_jaxpr(forward)(variables, images).jaxpr
    leaves = jax.tree_util.tree_leaves_with_path(variables)
    is_parameter = [path[0].key == "params" for path, _ in leaves]
    values = [_Value(origins=frozenset([i] if own else [])) for i, own in enumerate(is_parameter)]
    sizes = {i: leaf.size for i, (_, leaf) in enumerate(leaves) if is_parameter[i]}
    counter = _Counter(sizes)
    wanted = [True] * len(trace.outvars)
    counter.walk(trace, [*values, _Value(depends=True)], wanted, _Module(type(model).__name__), 1)
    return counter.cost()


def _mark(function, args, keywords, context):
    """Leaves in the trace which module an equation stands in, and whether that is a norm."""
    module = context.module
    is_norm = any(kind.__name__.endswith("Norm") for kind in type(module).__mro__)
    path = "/".join(module.path) or type(module).__name__
    with jax.named_scope((NORM if is_norm else MARK) + path):
        return function(*args, **keywords)


class _Module(NamedTuple):
    path: str
    is_norm: bool = False


def _module(equation, around: _Module) -> _Module:
    """The innermost module of an equation; one in an inner trace names none that is `around`."""
    for scope in reversed(equation.source_info.name_stack.stack):
        for mark in (NORM, MARK):
            if scope.name.startswith(mark):
                return _Module(scope.name.removeprefix(mark), mark is NORM)
    return around


class _Value(NamedTuple):
    """What is known of a variable of a trace.

    Attributes:
      depends: whether it depends on the image.
      origins: of a constant: which variables of the network it is computed of.
      layer: of what a convolution or product gave: its layer.
      pooled: whether a pooling gave it.
    """

    depends: bool = False
    origins: frozenset[int] = frozenset()
    layer: str = ""
    pooled: bool = False


CONSTANT, DEPENDENT = _Value(), _Value(depends=True)


def _live(trace, wanted: Sequence[bool]) -> Iterator[tuple[Any, list[bool]]]:
    """The equations that the wanted results need, each with which of its own results are needed."""
    found: list = []
    needed = {v for v, want in zip(trace.outvars, wanted, strict=True) if want and _named(v)}
    for equation in reversed(trace.eqns):
        flags = [v in needed for v in equation.outvars]
        if any(flags):
            found.append((equation, flags))
            needed.update(filter(_named, equation.invars))
    return reversed(found)


def _named(variable) -> bool:
    return not isinstance(variable, Literal)


def _inner(trace):
    """A trace inside an equation, without its constants, which are none of the image."""
    return getattr(trace, "jaxpr", trace)


def _of_same_rank(outside, inside) -> int:
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outside, inside, strict=True))


class _Counter:
    """Sums by layer while it walks through a trace.

    Attributes:
      layers: name to sums by field of `Layer`, operations by (column, "mul" or "add").
      current: name of the layer last met.
      missing: names of primitives that are not counted.
      sizes: numbers of elements of the parameters that are not used yet.
    """

    def __init__(self, sizes: dict[int, int]):
        self.layers: dict[str, collections.Counter] = {}
        self.current = "input"
        self.missing: set[str] = set()
        self.sizes = sizes

    def cost(self) -> Cost:
        layers = []
        for name, sums in self.layers.items():
            columns = {c: Operations(sums[c, "mul"], sums[c, "add"]) for c in COLUMNS}
            own = {key: number for key, number in sums.items() if isinstance(key, str)}
            layers.append(Layer(name, **own, **columns))
        unused = sum(self.sizes.values())
        layers = [layer for layer in layers if layer != Layer(layer.name)]
        layers += [Layer("unused", params=unused)] if unused else []
        return Cost(tuple(layers), tuple(sorted(self.missing)))

    def walk(self, trace, values, wanted, around: _Module, times: int) -> list[_Value]:
        """Counts the equations of `trace`, `times` each; returns what is known of its results."""
        known = dict(zip(trace.invars, values, strict=True))

        def read(variable) -> _Value:
            return known.get(variable, CONSTANT) if _named(variable) else CONSTANT

        for equation, flags in _live(trace, wanted):
            inputs = [read(v) for v in equation.invars]
            if any(value.depends for value in inputs):
                found = self._equation(equation, inputs, flags, _module(equation, around), times)
            else:
                found = _Value(origins=frozenset().union(*(value.origins for value in inputs)))
            if isinstance(found, _Value):
                found = [found] * len(equation.outvars)
            known.update(zip(equation.outvars, found, strict=True))
        return [read(v) for v in trace.outvars]

    def _equation(self, equation, inputs, flags, module: _Module, times: int):
        name = equation.primitive.name
        if name in CALLS:
            key = "jaxpr" if "jaxpr" in equation.params else "call_jaxpr"
            return self.walk(_inner(equation.params[key]), inputs, flags, module, times)
        if name == "scan":
            return self._scan(equation, inputs, flags, module, times)
        if name == "cond":
            return self._dearest(equation, inputs, flags, module, times)
        if (done := primitives.terms(equation)) is not None:
            self.current = module.path
            self._add(self.current, inputs, times, zip(("mul", "add", "xnor"), done, strict=True))
            self.layers[self.current]["activations"] += times * equation.outvars[0].aval.size
            return _Value(depends=True, layer=self.current)
        if (done := primitives.operations(equation)) is None:
            self.missing.add(name)
            done = 0, 0
        return self._other(name, inputs, done, module, times)

    def _other(self, name, inputs, done: tuple[int, int], module: _Module, times: int) -> _Value:
        """Counts what is no convolution or product, in the column where it belongs."""
        (first, *more) = (value for value in inputs if value.depends)
        learnt = any(value.origins for value in inputs)
        layer, column = self.current, "activation"
        if name in primitives.FREE:
            self._add(layer, inputs, times, ())
            return DEPENDENT if more else first
        if module.is_norm:
            column = "norm"
        elif name in ("add", "sub") and first.layer and not more and learnt:
            layer, column = first.layer, ""  # a bias
        elif name in primitives.POOLS or (name in ("div", "mul") and first.pooled and not more):
            column = "pool"  # or the division that makes a sum a mean
        elif name in ("add", "sub", "add_any") and more:
            column = "sum"
        keys = [(column, what) if column else what for what in ("mul", "add")]
        self._add(layer, inputs, times, zip(keys, done, strict=True))
        return _Value(depends=True, pooled=name in primitives.POOLS)

    def _add(self, layer: str, inputs, times: int, done) -> None:
        sums = self.layers.setdefault(layer, collections.Counter())
        for key, number in done:
            sums[key] += times * number
        for origin in frozenset().union(*(value.origins for value in inputs)):
            sums["params"] += self.sizes.pop(origin, 0)

    def _scan(self, equation, inputs, flags, module: _Module, times: int) -> list[_Value]:
        body = _inner(equation.params["jaxpr"])
        flags = list(flags)
        # Operands are constants, carry and what is scanned, results carry and what is stacked; the
        # parameters that say how many have changed from version to version, the ranks have not.
        last = _of_same_rank(equation.invars, body.invars)
        first = last - _of_same_rank(equation.outvars, body.outvars)
        while True:  # what of the carry the wanted results need, round after round
            needed = {v for each, _ in _live(body, flags) for v in filter(_named, each.invars)}
            needed |= {v for v, want in zip(body.outvars, flags, strict=True) if want and _named(v)}
            more = [v in needed for v in body.invars[first:last]]
            wanted = [a or b for a, b in zip(flags, more, strict=False)] + flags[len(more) :]
            if wanted == flags:
                break
            flags = wanted
        while True:  # until what the body does to its carry is known
            results = copy.deepcopy(self).walk(body, inputs, wanted, module, 0)
            carry = [
                _Value(old.depends or new.depends, old.origins | new.origins)
                for old, new in zip(inputs[first:last], results[: last - first], strict=True)
            ]
            if carry == inputs[first:last]:
                break
            inputs = [*inputs[:first], *carry, *inputs[last:]]
        return self.walk(body, inputs, wanted, module, times * equation.params["length"])

    def _dearest(self, equation, inputs, flags, module: _Module, times: int) -> list[_Value]:
        index, *operands = inputs
        found = []
        for branch in equation.params["branches"]:
            other = copy.deepcopy(self)
            results = other.walk(_inner(branch), operands, flags, module, times)
            found.append((other.cost().energy_pj(), other, results))
        _, dearest, _ = max(found, key=lambda each: each[0])
        vars(self).update(vars(dearest))
        self.missing.update(*(other.missing for _, other, _ in found))
        if index.depends:
            return [DEPENDENT] * len(flags)
        return [
            _Value(any(v.depends for v in each), frozenset().union(*(v.origins for v in each)))
            for each in zip(*(results for *_, results in found), strict=True)
        ]
