"""The layers whose adder convolution `adder.py` measures, and their passes in JAX."""

import math

import jax
from jax import lax

from pkkd_jax.ops.adder import adder_conv

# batch, height, width, c_in, c_out, size of the filters, stride
LAYERS = [
    (128, 32, 32, 16, 16, 3, 1),
    (128, 16, 16, 32, 32, 3, 1),
    (128, 8, 8, 64, 64, 3, 1),
    (128, 32, 32, 16, 32, 3, 2),
    (128, 32, 32, 16, 32, 1, 2),
    (32, 56, 56, 64, 64, 3, 1),
    (32, 28, 28, 128, 128, 3, 1),
    (32, 14, 14, 256, 256, 3, 1),
    (32, 7, 7, 512, 512, 3, 1),
    (32, 56, 56, 256, 64, 1, 1),
]
# MobileNet's depthwise layers, at which every channel is a group.
DEPTHWISE = [
    (32, 112, 112, 32, 32, 3, 1),
    (32, 56, 56, 128, 128, 3, 1),
    (32, 28, 28, 256, 256, 3, 1),
    (32, 14, 14, 512, 512, 3, 1),
    (32, 7, 7, 1024, 1024, 3, 1),
]
PASSES = ("forward", "dx", "dw")


def shapes(layer, depthwise=False):
    """Shapes of x, w and y, and the terms of one pass."""
    n, h, w, c_in, c_out, size, stride = layer
    y = (n, -(-h // stride), -(-w // stride), c_out)
    per_group = 1 if depthwise else c_in
    terms = math.prod(y) * size * size * per_group
    return (n, h, w, c_in), (size, size, per_group, c_out), y, terms


def title(layer, depthwise=False) -> str:
    """A short name."""
    n, h, _, c_in, c_out, size, stride = layer
    text = f"{n} x {h}x{h} {c_in}->{c_out} {size}x{size}"
    return text + (" /2" if stride == 2 else "") + (" depthwise" if depthwise else "")


def operands(layer, depthwise=False) -> tuple:
    """x, w and dy from N(0, 1)."""
    keys = jax.random.split(jax.random.key(0), 3)
    return tuple(
        jax.random.normal(k, s) for k, s in zip(keys, shapes(layer, depthwise)[:3], strict=True)
    )


def jax_functions(layer, adder: bool, depthwise=False) -> dict:
    """The three passes as functions of x, w and dy."""
    x_shape, w_shape, _, _ = shapes(layer, depthwise)
    strides, groups = (layer[6],) * 2, x_shape[3] // w_shape[2]

    def convolution(x, w):
        if adder:
            return adder_conv(x, w, strides=strides, feature_group_count=groups)
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, w, strides, "SAME", dimension_numbers=dimensions, feature_group_count=groups
        )

    return {
        "forward": lambda x, w, dy: convolution(x, w),
        "dx": lambda x, w, dy: jax.vjp(lambda x: convolution(x, w), x)[1](dy)[0],
        "dw": lambda x, w, dy: jax.vjp(lambda w: convolution(x, w), w)[1](dy)[0],
    }
