"""The ordinary convolution against XLA's, to any order of differentiation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import implementations
from jax import export, lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pkkd_jax.ops.conv import conv_general_dilated, sum_of_products

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
# strides, padding, dilation, groups
CASES = [
    ((1, 1), "SAME", (1, 1), 1),
    ((2, 1), "VALID", (1, 2), 2),
    ((3, 2), ((1, 0), (2, 1)), (1, 1), 4),
]


def functions(case):
    """The same convolution by XLA and by us."""
    strides, padding, dilation, groups = case
    options = dict(
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=DIMENSIONS,
        feature_group_count=groups,
    )
    return [
        functools.partial(f, **options) for f in (lax.conv_general_dilated, conv_general_dilated)
    ]


def operands(groups=1):
    keys = jax.random.split(jax.random.key(0), 2)
    return jax.random.normal(keys[0], (3, 9, 8, 4)), jax.random.normal(
        keys[1], (3, 2, 4 // groups, 8)
    )


def assert_close(wanted, found):
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert a.dtype == b.dtype
        scale = np.abs(np.float64(a)).max()
        assert np.abs(np.float64(a) - np.float64(b)).max() <= 5e-6 * scale


def loss(convolution, x, w):
    return jnp.sin(convolution(x, w)).sum()


TRANSFORMATIONS = {
    "value": lambda f: f,
    "grad": lambda f: jax.grad(functools.partial(loss, f), (0, 1)),
    "jvp": lambda f: lambda x, w: jax.jvp(f, (x, w), (x + 1, w * w)),
    "jvp of grad": lambda f: (
        lambda x, w: jax.jvp(jax.grad(functools.partial(loss, f), (0, 1)), (x, w), (x + 1, w * w))
    ),
    "vmap over filters": lambda f: (
        lambda x, w: jax.vmap(jax.grad(functools.partial(loss, f), (0, 1)), (None, 0))(
            x, jnp.stack([w, 2 * w])
        )
    ),
    "vmap over images": lambda f: (
        lambda x, w: jax.vmap(jax.grad(functools.partial(loss, f), (0, 1)), (0, None))(
            jnp.stack([x, x + 1]), w
        )
    ),
}


# The kernels of each instruction set face float64 loops in test_native.py.
@pytest.mark.parametrize(
    "implementation", sorted({implementations()[0], "portable"}), indirect=True
)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
def test_equals_xla(transformation, case, implementation):
    theirs, ours = map(TRANSFORMATIONS[transformation], functions(case))
    x, w = operands(case[3])
    assert_close(theirs(x, w), ours(x, w))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_one_device(check_vma):
    ours = functions(CASES[0])[1]
    x, w = operands()
    x = jnp.concatenate([x, x + 1])[:4]
    mesh = Mesh(np.array(jax.devices()[:4]), ("i",))

    def local(x, w):
        dx, dw = jax.grad(functools.partial(loss, ours), (0, 1))(x, w)
        return dx, dw if check_vma else lax.psum(dw, "i")

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P("i"), P()), out_specs=(P("i"), P()), check_vma=check_vma
    )
    assert_close(jax.grad(functools.partial(loss, ours), (0, 1))(x, w), jax.jit(mapped)(x, w))


def test_bfloat16_is_rounded_once():
    theirs, ours = functions(CASES[0])
    x, w = (a.astype(jnp.bfloat16) for a in operands())
    found, wanted = ours(x, w), theirs(x.astype(jnp.float32), w.astype(jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), wanted, rtol=2**-8, atol=1e-3)


def test_an_export_holds_no_call_of_a_kernel():
    ours = functions(CASES[0])[1]
    exported = export.export(jax.jit(ours), platforms=("cpu", "cuda"))(*operands())
    assert "@pkkd_" not in exported.mlir_module()
    assert_close(ours(*operands()), exported.call(*operands()))


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((2, 9, 4), (3, 4, 5), dict(dimension_numbers=("NWC", "WIO", "NWC"), window_strides=(1,))),
        ((2, 4, 9, 8), (5, 4, 3, 3), dict(dimension_numbers=("NCHW", "OIHW", "NCHW"))),
        ((2, 9, 8, 4), (2, 2, 4, 5), dict(dimension_numbers=DIMENSIONS, padding="SAME_LOWER")),
        (
            (2, 9, 8, 4),
            (3, 3, 4, 5),
            dict(dimension_numbers=DIMENSIONS, lhs_dilation=(2, 1), padding=((1, 1),) * 2),
        ),
    ],
    ids=["one dimension", "NCHW", "SAME_LOWER", "dilated input"],
)
def test_what_has_no_kernel_is_left_to_xla(shape, kernel, options):
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], shape), jax.random.normal(keys[1], kernel)
    options = {"window_strides": (1, 1), "padding": "SAME", **options}
    ours = functools.partial(conv_general_dilated, **options)
    assert_close(lax.conv_general_dilated(x, w, **options), ours(x, w))
    assert "conv_general_dilated" in str(jax.make_jaxpr(ours)(x, w))


def test_precision_reaches_xla_where_there_is_no_kernel():
    ours = functions(CASES[0])[1]

    def lowered(function):
        return jax.jit(function).trace(*operands()).lower(lowering_platforms=("tpu",)).as_text()

    assert "HIGHEST" not in lowered(ours)
    assert "HIGHEST" in lowered(functools.partial(ours, precision="highest"))
    with jax.default_matmul_precision("highest"):
        assert "HIGHEST" in lowered(lambda x, w: jax.grad(functools.partial(loss, ours), 1)(x, w))


def test_sum_of_products_is_a_matrix_product():
    a, b = operands()[0], jax.random.normal(jax.random.key(2), (3, 9, 8, 5))
    product = lambda a, b: jnp.einsum("nijc,nijo->co", a, b)  # noqa: E731
    assert_close(product(a, b), sum_of_products(a, b))
    gradients = [
        jax.grad(lambda a, b, f=f: (f(a, b) ** 2).sum(), (0, 1)) for f in (product, sum_of_products)
    ]
    assert_close(gradients[0](a, b), gradients[1](a, b))
