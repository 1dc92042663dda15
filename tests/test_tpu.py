"""The kernel for TPUs: interpreted against float64 loops, and lowered for an absent one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adder import data, reference
from test_gpu import NETWORKS, assert_equals_float64_loops, lowered_training, with_surrogates

from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops import tpu

# Several tiles along places and channels, and several blocks of terms.
LARGER = [
    ((3, 3, 11, 131), (2, 2), 70, (1, 1), "SAME", (1, 1), 1),
    ((130, 3, 5, 9), (3, 2), 18, (1, 2), "SAME", (1, 1), 1),
]


@pytest.mark.parametrize(("case", "surrogate"), with_surrogates(LARGER), ids=str)
def test_kernel_equals_float64_loops(case, surrogate):
    assert_equals_float64_loops(tpu, case, surrogate, True)


def test_an_offset_of_a_channel_that_images_and_filters_share_does_not_cancel():
    shape, w_shape = (2, 5, 6, 40), (3, 3, 40, 9)
    x, w = data(shape, w_shape)
    offsets = 1000 * jnp.arange(40.0)  # what is left of the normal numbers is exact in float64
    x, w = x + offsets, w + offsets[:, None]
    geometry = geometry_lib.resolve(shape, w_shape, 1, "VALID", 1, 1, "hardtanh")
    expected, *_ = reference(x, w, None, (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    found = tpu.forward(x, w, geometry, True)
    np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize(("name", "depth", "size"), NETWORKS)
def test_every_adder_layer_lowers_for_tpu(name, depth, size):
    text, layers = lowered_training("tpu", name, depth, size)
    assert "stablehlo.while" not in text
    assert text.count("call @_gather") >= 2 * layers


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_tiles_fit_and_are_never_one_register_wide(stride, gradient):
    # Wide layers of ResNets, a stage of single pixels, filters that leave no room for 512 lanes.
    for channels, columns, taps in ((512, 7, 3), (2048, 7, 1), (512, 1, 3), (64, 56, 7)):
        w_shape = (taps, taps, channels, channels)
        found = tpu.tiling(w_shape, columns, 128, (stride, stride), (1, 1), gradient)
        assert found.width % 256 == 0
        assert channels % found.block == 0
    assert tpu.tiling((5, 5, 4096, 4096), 8, 128, (1, 1), (1, 1), gradient) is None


@pytest.mark.parametrize(
    ("shape", "taps"),
    [
        ((8, 8, 8, 16), 3),  # of the lanes that a batch is padded to, few would be used
        ((128, 8, 8, 4096), 5),  # more than the memory beside the vector unit holds
    ],
)
def test_plain_jax_serves_what_the_kernel_would_not_speed_up_or_hold(shape, taps):
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, (taps, taps, shape[3], shape[3])))
    geometry = geometry_lib.resolve(x.shape, w.shape, 1, "SAME", 1, 1, "hardtanh")
    for function, operands in ((tpu.forward, (x, w)), (tpu.input_gradient, (x, w, x))):
        jaxpr = jax.make_jaxpr(functools.partial(function, geometry=geometry))(*operands)
        assert "pallas_call" not in str(jaxpr)
