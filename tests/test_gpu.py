"""The kernels for Hopper GPUs: interpreted against float64 loops, lowered for an absent card."""

import functools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adder import CASES, data, pairs, reference_with_crop

from pkkd_jax import models
from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops import gpu, portable

# Mosaic GPU's interpreter came with JAX 0.12, its lowering works from 0.11.2 on.
INTERPRETS = jax.__version_info__ >= (0, 12)
LOWERS = jax.__version_info__ >= gpu.JAX_VERSION
# A shape that fills no tile, and one of several tiles, stages and blocks of channels.
LARGER = [
    ((3, 4, 25, 37), (2, 2), 70, (1, 1), "SAME", (1, 1), 1),
    ((20, 6, 7, 20), (3, 2), 18, (1, 2), "SAME", (1, 1), 1),
]


def with_surrogates(larger):
    """Cases and surrogates for `assert_equals_float64_loops`, with `larger` shapes."""
    return [(case, "hardtanh") for case in [*CASES, *larger] if case[6] == 1] + [
        (CASES[i], surrogate) for i in (1, 3) for surrogate in ("sign", "full")
    ]


def assert_equals_float64_loops(rules, case, surrogate, interpret):
    """Compares `forward` and `input_gradient` of the module `rules`, interpreted."""
    shape, taps, c_out, strides, padding, dilation, _ = case
    x, w = data(shape, (*taps, shape[3], c_out))
    geometry = geometry_lib.resolve(shape, w.shape, strides, padding, dilation, 1, surrogate)
    dy = jax.random.normal(jax.random.key(2), geometry.output_shape(shape, w.shape))
    found = (
        rules.forward(x, w, geometry, interpret),
        rules.input_gradient(x, w, dy, geometry, interpret),
    )
    expected = reference_with_crop(x, w, dy, strides, pairs(case), dilation, 1, surrogate)
    for ours, theirs in zip(found, expected, strict=False):
        np.testing.assert_allclose(ours, theirs, atol=2e-6 * np.abs(theirs).max(), rtol=0)


@pytest.mark.skipif(not INTERPRETS, reason="the interpreter needs JAX 0.12")
@pytest.mark.parametrize(("case", "surrogate"), with_surrogates(LARGER), ids=str)
def test_kernels_equal_float64_loops(case, surrogate):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    assert_equals_float64_loops(gpu, case, surrogate, plgpu.InterpretGPUParams())


@pytest.mark.skipif(not INTERPRETS, reason="the interpreter needs JAX 0.12")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_as_exact_as_its_results_are_rounded(dtype):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    case = ((2, 5, 6, 20), (3, 3), 18, (2, 1), "SAME", (1, 1), 1)
    x, w = (a.astype(dtype) for a in data(case[0], (3, 3, 20, 18)))
    geometry = geometry_lib.resolve(x.shape, w.shape, (2, 1), "SAME", 1, 1, "hardtanh")
    y = gpu.forward(x, w, geometry, plgpu.InterpretGPUParams())
    expected, _, _ = reference_with_crop(x, w, None, (2, 1), pairs(case), (1, 1), 1)
    # A difference and three additions are rounded; every term of a sum is of one sign.
    np.testing.assert_allclose(y, expected, rtol=4 * float(jnp.finfo(dtype).eps) / 2)


@pytest.mark.skipif(not LOWERS, reason="the kernels need JAX 0.11.2")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 3, 6, 20])
def test_copies_begin_at_multiples_of_16_bytes(monkeypatch, batch, dtype):
    """A Hopper refuses others as an illegal instruction, which no interpreter shows."""
    from pkkd_jax.ops import mosaic

    begins = []

    def gather(v, w, x, *, tile, grid, offset, **_):
        for tap in range(w.shape[0]):
            places = int(offset(tap)[2]) + tile[0] * np.arange(grid[1])
            assert places[-1] + tile[0] <= v.shape[3]
            begins.extend(places * v.dtype.itemsize)
        assert v.shape[3] * v.dtype.itemsize % 16 == 0
        return jnp.zeros((grid[0], grid[1] * tile[0], grid[2] * tile[1]))

    monkeypatch.setattr(mosaic, "gather", gather)
    x, w = (a.astype(dtype) for a in data((batch, 9, 8, 5), (3, 3, 5, 4)))
    for strides, dilation in ((1, 1), (2, 1), (1, 2)):
        geometry = geometry_lib.resolve(x.shape, w.shape, strides, "SAME", dilation, 1, "hardtanh")
        dy = jnp.zeros(geometry.output_shape(x.shape, w.shape))
        with jax.disable_jit():
            assert gpu.forward(x, w, geometry).shape == dy.shape
            assert gpu.input_gradient(x, w, dy, geometry).shape == x.shape
    assert begins
    assert not np.any(np.array(begins) % 16)


NETWORKS = [("resnet_cifar", 20, 32), ("resnet_imagenet", 18, 64), ("resnet_imagenet", 50, 64)]


def lowered_training(platform, name, depth, size):
    """The text of a network's gradient lowered for `platform`, and its number of adder layers."""
    model = models.build(name, depth=depth, num_classes=10, conv="adder")
    images = jax.ShapeDtypeStruct((64, size, size, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )

    def loss(params, statistics, images):
        variables = {"params": params, "batch_stats": statistics}
        return model.apply(variables, images, train=True, mutable="batch_stats")[0].logits.sum()

    arguments = variables["params"], variables["batch_stats"], images
    lowered = jax.jit(jax.grad(loss)).trace(*arguments).lower(lowering_platforms=(platform,))
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return lowered.as_text(), sum("filters" in str(path) for path, _ in leaves)


@pytest.mark.parametrize(("name", "depth", "size"), NETWORKS)
def test_every_adder_layer_lowers_for_cuda(name, depth, size):
    text, layers = lowered_training("cuda", name, depth, size)
    if LOWERS:
        # Equal layers share a function. There is no loop: none took the portable form.
        assert "stablehlo.while" not in text
        assert text.count("call @_gather") >= 2 * layers
    else:
        assert text.count("stablehlo.while") >= 2 * layers


@pytest.mark.skipif(not LOWERS, reason="the kernels need JAX 0.11.2")
@pytest.mark.parametrize("stride", [1, 2])
def test_nothing_is_unfolded_in_memory(stride):
    x, w = jnp.zeros((16, 56, 56, 64)), jnp.zeros((3, 3, 64, 64))
    geometry = geometry_lib.resolve(x.shape, w.shape, stride, "SAME", 1, 1, "hardtanh")
    dy = jnp.zeros(geometry.output_shape(x.shape, w.shape))
    for function, operands in ((gpu.forward, (x, w)), (gpu.input_gradient, (x, w, dy))):
        jaxpr = jax.make_jaxpr(functools.partial(function, geometry=geometry))(*operands)
        largest = max(math.prod(shape) for shape in shapes_in(jaxpr.jaxpr))
        assert largest < 1.2 * max(x.size, dy.size)


def shapes_in(jaxpr):
    """Of all results outside of kernels."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        if equation.primitive.name in ("jit", "pjit"):
            yield from shapes_in(equation.params["jaxpr"].jaxpr)


def test_plain_jax_serves_more_rows_than_cuda_counts():
    x, w = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 70000, 1, 8), (3, 3, 8, 8)))
    geometry = geometry_lib.resolve(x.shape, w.shape, 1, "SAME", 1, 1, "hardtanh")
    for function, operands in ((gpu.forward, (x, w)), (gpu.input_gradient, (x, w, x))):
        jaxpr = jax.make_jaxpr(functools.partial(function, geometry=geometry))(*operands)
        assert "_gather" not in str(jaxpr)


def test_plain_jax_serves_where_the_kernels_cannot_and_says_so_once(monkeypatch):
    x, w = data((2, 5, 5, 3), (3, 3, 3, 4))
    geometry = geometry_lib.resolve(x.shape, w.shape, 1, "SAME", 1, 1, "hardtanh")
    monkeypatch.setattr(gpu, "JAX_VERSION", (99, 0, 0))
    gpu.selected.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"need JAX 99\.0\.0 or newer, not"):
            first = gpu.forward(x, w, geometry)
        with warnings.catch_warnings(action="error"):
            second = gpu.input_gradient(x, w, first, geometry)
    finally:
        gpu.selected.cache_clear()
    np.testing.assert_array_equal(first, portable.forward(x, w, geometry))
    np.testing.assert_array_equal(second, portable.input_gradient(x, w, first, geometry))
