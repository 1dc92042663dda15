"""The teacher of distances: what it adds to a network's features, and nothing else."""

import jax
import numpy as np
import pytest

from experiments import gaussian
from pkkd_jax import models

IMAGES = jax.random.normal(jax.random.key(1), (3, 12, 20, 3))


@pytest.fixture(scope="module")
def networks():
    distances = gaussian.resnet_cifar(num_classes=10, depth=8)
    plain = models.build("resnet_cifar", num_classes=10, depth=8)
    variables = plain.init(jax.random.key(0), IMAGES, train=False)
    return variables, *(model.apply(variables, IMAGES, train=False) for model in (distances, plain))


@pytest.mark.parametrize(
    ("tap", "of", "size", "strides"),
    [
        ("stem", None, 3, 1),
        ("stage1.block1.conv1", "stem.out", 3, 1),
        ("stage2.block1.conv1", "stage1.block1.out", 3, 2),
        ("stage3.block1.shortcut", "stage2.block1.out", 1, 2),
    ],
)
def test_features_are_half_the_squared_distances(networks, tap, of, size, strides):
    variables, outputs, _ = networks
    x = np.asarray(IMAGES if of is None else outputs.features[of], np.float64)
    layer = variables["params"]
    for part in tap.replace(".block", "_block").split("."):
        layer = layer[part]
    filters = np.asarray(layer["kernel"], np.float64)
    pad = size // 2
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    got = outputs.features[tap]
    for n, i, j, o in np.ndindex(got.shape):
        patch = x[n, i * strides :, j * strides :][:size, :size]
        want = -np.square(patch - filters[..., o]).sum() / 2
        np.testing.assert_allclose(got[n, i, j, o], want, rtol=1e-4, atol=1e-4)


def test_the_network_itself_stays_the_same(networks):
    _, outputs, plain = networks
    np.testing.assert_array_equal(outputs.logits, plain.logits)
    for tap in ("stem.out", "stage3.block1.out", "penultimate"):
        np.testing.assert_array_equal(outputs.features[tap], plain.features[tap])
