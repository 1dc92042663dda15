"""Batch normalisation against float64 by definition, over devices, and as the module of Flax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from pkkd_jax import nn
from pkkd_jax.ops.batch_norm import batch_norm

EPSILON = 1e-5


def defined(x, scale, bias):
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    axes = tuple(range(x.ndim - 1))
    mean, var = x.mean(axes), x.var(axes)
    return (x - mean) / np.sqrt(var + EPSILON) * scale + bias, mean, var


def operands(shape):
    keys = jax.random.split(jax.random.key(0), 4)
    x, dy = (jax.random.normal(key, shape) for key in keys[:2])
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[2:])
    return 3 * x - 2, scale, bias, dy


@pytest.mark.parametrize("shape", [(3, 2, 5, 3), (7, 2)])
def test_it_and_its_gradients_equal_the_definition_in_float64(shape):
    x, scale, bias, dy = operands(shape)
    (y, mean, var), vjp = jax.vjp(lambda *a: batch_norm(*a, EPSILON), x, scale, bias)
    for ours, theirs in zip((y, mean, var), defined(x, scale, bias), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=2e-6)
    # What flows into mean and variance must change nothing.
    gradients = vjp((dy, jnp.ones_like(mean), jnp.ones_like(var)))
    places = [np.asarray(a, np.float64) for a in (x, scale, bias)]
    for index, gradient in enumerate(gradients):
        for place in np.ndindex(gradient.shape):
            values = []
            for step in (1e-5, -1e-5):
                moved = [a.copy() for a in places]
                moved[index][place] += step
                values.append((defined(*moved)[0] * np.asarray(dy, np.float64)).sum())
            np.testing.assert_allclose(gradient[place], np.diff(values)[0] / -2e-5, atol=2e-5)


def test_devices_together_equal_one():
    x, scale, bias, dy = operands((8, 3, 2, 5))

    def run(x, dy, axis_name):
        y, vjp, statistics = jax.vjp(
            lambda *a: (lambda y, *rest: (y, rest))(*batch_norm(*a, EPSILON, axis_name)),
            x, scale, bias, has_aux=True,
        )  # fmt: skip
        return y, statistics, vjp(dy)

    split = jax.tree.map(lambda a: a.reshape(4, 2, *a.shape[1:]), (x, dy))
    y, statistics, (dx, *sums) = jax.pmap(lambda *a: run(*a, "batch"), axis_name="batch")(*split)
    one, expected_statistics, (expected_dx, *expected_sums) = run(x, dy, None)
    np.testing.assert_allclose(y.reshape(x.shape), one, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx.reshape(x.shape), expected_dx, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(sums, expected_sums, strict=True):  # each device has its share
        np.testing.assert_allclose(ours.sum(0), theirs, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(statistics, expected_statistics, strict=True):
        np.testing.assert_allclose(ours, np.broadcast_to(theirs, ours.shape), rtol=1e-5)


def test_a_large_mean_does_not_cancel():
    x, scale, bias, _ = operands((64, 4, 4, 3))
    x = x + 30_000
    _, mean, var = batch_norm(x, scale, bias, EPSILON)
    _, expected_mean, expected_var = defined(x, scale, bias)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-6)
    np.testing.assert_allclose(var, expected_var, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_module_is_that_of_flax(dtype):
    x = operands((4, 3, 5, 6))[0].astype(dtype)
    arguments = {"momentum": 0.9, "epsilon": EPSILON, "dtype": dtype}
    ours, theirs = (kind(**arguments) for kind in (nn.BatchNorm, linen.BatchNorm))
    variables = ours.init(jax.random.key(0), x, use_running_average=True)
    expected = theirs.init(jax.random.key(0), x, use_running_average=True)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    for average in (False, True):
        found, wanted = (
            module.apply(variables, x, use_running_average=average, mutable="batch_stats")
            for module in (ours, theirs)
        )
        assert found[0].dtype == wanted[0].dtype
        tolerance = 2e-2 if dtype == "bfloat16" else 1e-5
        np.testing.assert_allclose(
            *(np.asarray(y[0], np.float32) for y in (found, wanted)), rtol=tolerance, atol=tolerance
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found[1], wanted[1])


@pytest.mark.parametrize(
    ("field", "value"), [("axis", 1), ("use_bias", False), ("use_scale", False)]
)
def test_a_field_that_it_cannot_honour_is_refused(field, value):
    with pytest.raises(ValueError, match=f"BatchNorm: {field}={value}; allowed: .*linen.BatchNorm"):
        nn.BatchNorm(**{field: value})
