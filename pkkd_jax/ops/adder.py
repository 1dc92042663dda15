"""The adder convolution: one differentiable function over primitives with a rule per platform."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend

from pkkd_jax.ops import cpu, gpu, portable, tpu
from pkkd_jax.ops import geometry as geometry_lib
from pkkd_jax.ops.primitive import define, vary_together

# Every lowering rule of the package; `None` serves each platform that has no line of its own. A
# rule is `(operands..., geometry) -> array`, traced by JAX.
RULES = {
    "forward": {
        None: portable.forward,
        "cpu": cpu.forward,
        "cuda": gpu.forward,
        "tpu": tpu.forward,
    },
    "input_gradient": {
        None: portable.input_gradient,
        "cpu": cpu.input_gradient,
        "cuda": gpu.input_gradient,
        "tpu": tpu.input_gradient,
    },
    "weight_gradient": {None: portable.weight_gradient, "cpu": cpu.weight_gradient},
}

DTYPES = {jnp.dtype(name) for name in ("float32", "bfloat16", "float16")}


def implementation(platform: str | None = None) -> str:
    """Names the implementation that `platform` uses: "portable" is plain JAX.

    On a CPU it is "avx512", "avx2" or "neon", the best that the processor runs, unless the
    environment variable PKKD_JAX_ADDER names one of them or "portable" when it is first used. On
    an NVIDIA GPU it is "mosaic" if it is a Hopper and JAX new enough, on a TPU "pallas".

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu"; that of this process's default device if None.
    Raises:
      UserError: if PKKD_JAX_ADDER names what is unknown, was not built or cannot run here.
    """
    if platform is None:
        platform = jax.default_backend()
        if platform == "gpu":  # JAX's one name for two
            version = get_backend().platform_version.lower()
            platform = "rocm" if "rocm" in version else "cuda"
    chosen = {"cpu": cpu.selected, "cuda": gpu.selected, "tpu": lambda: "pallas"}
    return chosen.get(platform, lambda: "portable")()


def adder_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    strides=(1, 1),
    padding="SAME",
    kernel_dilation=(1, 1),
    feature_group_count: int = 1,
    input_gradient: str = "hardtanh",
) -> jax.Array:
    """Adder convolution: negative L1 distance between patches and filters.

        y[n,i,j,o] = -sum_{u,v,c} |x[n, i*s+u-p, j*s+v-p, c] - w[u,v,c,o]|

    Its VJP is a surrogate, not the derivative:

        dw = sum over places of dy * (x - w)
        dx = sum over filters of dy * clip(w - x, -1, 1)

    Zero padding is not neutral: a padded place adds -|w|.

    Args:
      x: `[batch, height, width, c_in]`, float32, bfloat16 or float16.
      w: `[kh, kw, c_in / feature_group_count, c_out]`, likewise.
      strides: an int, or one for rows and one for columns.
      padding: "SAME" and "VALID" as XLA defines them, an int, or a `(low, high)` pair a dimension.
      kernel_dilation: distance between neighbouring taps, an int or two.
      feature_group_count: number of groups; `c_in` makes the layer depthwise.
      input_gradient: "hardtanh" as above; "sign" (the L1 derivative) or "full" (`w - x`, the
        derivative of half the squared L2 distance) for ablations.
    Returns:
      `[batch, height', width', c_out]`, dtype of `x`, every value <= 0; sums are float32, but on
      Hopper GPUs of eight terms of float16 first.
    Raises:
      ValueError: if shapes or dtypes do not fit or an argument is out of range; the message prints
        them.
    References:
      Chen et al., AdderNet, CVPR 2020, Eqs. 1, 5, 6.
    """
    if not {x.dtype, w.dtype} <= DTYPES:
        raise ValueError(
            f"{x.dtype=}, {w.dtype=}: expected float32, bfloat16 or float16; cast with .astype"
        )
    geometry = geometry_lib.resolve(
        x.shape, w.shape, strides, padding, kernel_dilation, feature_group_count, input_gradient
    )
    # Under shard_map the primitives want operands that vary over the same mesh axes; the cast is
    # made here, outside the VJP, because its transpose is the sum over those axes.
    x, w = vary_together(x, w)
    return _adder_conv(geometry, x, w)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adder_conv(geometry, x, w):
    return forward_p.bind(x, w, geometry=geometry)


def _adder_conv_fwd(geometry, x, w):
    return _adder_conv(geometry, x, w), (x, w)


def _adder_conv_bwd(geometry, residuals, dy):
    x, w = residuals
    dx = input_gradient_p.bind(x, w, dy, geometry=geometry)
    dw = weight_gradient_p.bind(x, w, dy, geometry=geometry)
    return dx, dw


_adder_conv.defvjp(_adder_conv_fwd, _adder_conv_bwd)


forward_p = define(
    "adder_forward",
    RULES["forward"],
    lambda x, w, *, geometry: x.update(shape=geometry.output_shape(x.shape, w.shape)),
    filters=1,
)
input_gradient_p = define(
    "adder_input_gradient",
    RULES["input_gradient"],
    lambda x, w, dy, *, geometry: x,
    filters=1,
)
weight_gradient_p = define(
    "adder_weight_gradient",
    RULES["weight_gradient"],
    lambda x, w, dy, *, geometry: w,
    filters=-1,
)
