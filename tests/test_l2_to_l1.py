"""Adder layers on their way from the l2 to the l1 distance."""

import jax
import numpy as np
import pytest

from experiments import l2_to_l1
from pkkd_jax import nn


@pytest.mark.parametrize(("updates", "share"), [(0, 0.0), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_the_response_goes_from_squared_to_absolute_distances(updates, share):
    layer = l2_to_l1.AdderConv(5, 3, 2, use_bias=False, steps=4)
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    variables = layer.init(jax.random.key(1), x)
    assert variables["batch_stats"]["updates"] == 0
    stats = {"updates": np.float32(updates)}
    got, after = layer.apply(
        {"params": variables["params"], "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    assert after["batch_stats"]["updates"] == updates + 1
    w = np.float64(variables["params"]["filters"])
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (0, 1), (0, 0)))
    for n, i, j, o in np.ndindex(got.shape):
        d = padded[n, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] - w[..., o]
        want = -(share * np.abs(d) + (1 - share) * d**2).sum()
        np.testing.assert_allclose(got[n, i, j, o], want, rtol=1e-4)
    plain = nn.AdderConv(5, 3, 2, use_bias=False).apply({"params": variables["params"]}, x)
    assert (np.asarray(got) == np.asarray(plain)).all() == (share == 1)


def test_evaluation_counts_no_update():
    layer = l2_to_l1.AdderConv(4, 3)
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    variables = layer.init(jax.random.key(1), x)
    first = layer.apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x), first)
