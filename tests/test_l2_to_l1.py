"""Adder layers on their way from the l2 to the l1 distance."""

import jax
import numpy as np
import pytest
from flax import linen

from experiments import l2_to_l1
from pkkd_jax import nn


@pytest.mark.parametrize(("passes", "share"), [(0, 0.0), (3, 0.75), (4, 1.0), (9, 1.0)])
def test_the_response_goes_from_squared_to_absolute_distances(passes, share):
    layer = l2_to_l1.AdderConv(5, 3, 2, bias_init=linen.initializers.normal(), steps=4)
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    variables = layer.init(jax.random.key(1), x)
    assert variables["batch_stats"]["passes"] == 0
    stats = {"passes": np.float32(passes)}
    got, after = layer.apply(
        {"params": variables["params"], "batch_stats": stats}, x, mutable=["batch_stats"]
    )
    assert after["batch_stats"]["passes"] == passes + 1
    w, bias = (np.float64(variables["params"][name]) for name in ("filters", "bias"))
    padded = np.pad(np.float64(x), ((0, 0), (1, 1), (0, 1), (0, 0)))
    for n, i, j, o in np.ndindex(got.shape):
        d = padded[n, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3] - w[..., o]
        want = -(share * np.abs(d) + (1 - share) * d**2).sum() + bias[o]
        np.testing.assert_allclose(got[n, i, j, o], want, rtol=1e-4)
    plain = nn.AdderConv(5, 3, 2).apply({"params": variables["params"]}, x)
    assert (np.asarray(got) == np.asarray(plain)).all() == (share == 1)


def test_evaluation_counts_no_update():
    layer = l2_to_l1.AdderConv(4, 3)
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    variables = layer.init(jax.random.key(1), x)
    first = layer.apply(variables, x)
    np.testing.assert_array_equal(layer.apply(variables, x), first)


def test_groups_are_refused():
    with pytest.raises(ValueError, match="feature_group_count=2; allowed: 1"):
        l2_to_l1.AdderConv(4, 3, feature_group_count=2).init(
            jax.random.key(0), np.ones((1, 4, 4, 2))
        )
