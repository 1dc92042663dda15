"""Standardised adder filters."""

import jax
import numpy as np

from experiments import standardised


def test_filters_are_standardised_one_by_one():
    layer = standardised.AdderConv(5, 3)
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    variables = layer.init(jax.random.key(1), x)
    filters = 3 + 2 * np.asarray(variables["params"]["filters"], np.float64)
    gain = np.arange(1.0, 6.0)
    params = {**variables["params"], "filters": filters.astype(np.float32), "gain": gain}
    got = layer.apply({"params": params}, x)
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for n, i, j, o in np.ndindex(got.shape):
        w = filters[..., o]
        w = gain[o] * (w - w.mean()) / w.std()
        want = -np.abs(padded[n, i : i + 3, j : j + 3] - w).sum()
        np.testing.assert_allclose(got[n, i, j, o], want, rtol=1e-4)


def test_neither_shift_nor_scale_of_a_filter_moves_the_response():
    layer = standardised.AdderConv(4, 3, use_bias=False)
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 3))
    variables = layer.init(jax.random.key(1), x)
    other = dict(variables["params"], filters=5 * variables["params"]["filters"] - 2)
    np.testing.assert_allclose(
        layer.apply({"params": other}, x), layer.apply(variables, x), rtol=1e-4
    )
