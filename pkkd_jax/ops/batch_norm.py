"""Batch normalisation in training: one pass over its input, and one over it and the gradient."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.ops.primitive import mean_over, vary_together


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    epsilon: float,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises the channels of `x` by the statistics of the batch.

        y = (x - mean) / sqrt(var + epsilon) * scale + bias

    Mean and variance are made of one pass's sums of `d = x - x'` and of `d^2`, with a place x' of
    the batch: `var = E[d^2] - E[d]^2` loses little to rounding however far the mean is from 0, as
    that of adders is. The gradient is that of the definition, likewise of one pass's sums.

    Args:
      x: `[batch, ..., channels]`.
      scale, bias: `[channels]`.
      epsilon: added to the variance.
      axis_name: a device axis over which the statistics are averaged.
    Returns:
      y in float32; mean and variance, `[channels]`, through which no gradient goes.
    References:
      Ioffe and Szegedy, Batch Normalization, ICML 2015.
    """
    # Under shard_map what differs less over devices is cast outside the VJP, as in `adder_conv`.
    y, *statistics = _batch_norm(epsilon, axis_name, *vary_together(x, scale, bias))
    return y, *map(lax.stop_gradient, statistics)


def _means(a, b):
    """`[2, channels]`: the means of both over images and places."""
    # Image by image first, both in one pass: on a GPU these are two kernels and not three.
    images = [v.mean(tuple(range(1, v.ndim - 1))) for v in (a, b)]
    return jnp.stack(images).mean(1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _batch_norm(epsilon, axis_name, x, scale, bias):
    return _forward(epsilon, axis_name, x, scale, bias)[0]


def _forward(epsilon, axis_name, x, scale, bias):
    place = x[(0, *(size // 2 for size in x.shape[1:-1]))].astype(jnp.float32)
    d = x - place
    first, second = _means(d, jnp.square(d))
    own_mean, own_var = place + first, jnp.maximum(second - jnp.square(first), 0)
    mean = mean_over(axis_name, own_mean)
    var = mean_over(axis_name, own_var + jnp.square(own_mean - mean))
    inverse = lax.rsqrt(var + epsilon)
    y = (x - mean) * (inverse * scale) + bias
    return (y, mean, var), (x, scale, mean, inverse)


def _backward(epsilon, axis_name, residuals, cotangents):
    del epsilon
    x, scale, mean, inverse = residuals
    dy, count = cotangents[0], math.prod(x.shape[:-1])
    normal = (x - mean) * inverse
    means = _means(dy, dy * normal)
    offset, slope = mean_over(axis_name, means)
    dx = (inverse * scale) * (dy - offset - normal * slope)
    return dx.astype(x.dtype), count * means[1], count * means[0]


_batch_norm.defvjp(_forward, _backward)
