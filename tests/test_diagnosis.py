"""What each loss has in the gradient of each layer."""

import jax
import numpy as np
from test_update import batch, initial, recipe

from pkkd_jax import devices, diagnosis, update


def gradient_shares(the_recipe, state):
    mapped = devices.pmap(diagnosis.gradient_shares(the_recipe), update.hyperparameters(the_recipe))
    return jax.device_get(mapped(state, batch(1)))


def test_the_losses_shares_in_each_layers_gradient_sum_to_one():
    start = initial()
    shares = gradient_shares(recipe(), start)
    layers = {name.partition("/")[2] for name in shares}
    assert len(layers) == 8  # the adder layers of ResNet-8
    for layer in layers:
        each = [shares[f"{loss}/{layer}"] for loss in ("ce", "pkkd", "kd", "own")]
        assert each[-1] == 0
        np.testing.assert_allclose(sum(each), 1, rtol=1e-4)
    heavier = recipe(alpha=50.0)
    found = gradient_shares(heavier, start)
    assert all(found[name] > shares[name] for name in shares if name.startswith("ce/"))
