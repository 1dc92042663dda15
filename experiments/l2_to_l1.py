"""Adder layers that begin with squared distances and end with absolute ones.

    python -m pkkd_jax.main --config=configs/resnet20.py \\
      --config.student.conv=experiments.l2_to_l1.AdderConv

The trained filters are those of an ordinary adder layer.
"""

import jax.numpy as jnp
from flax import linen
from jax import Array, lax

from pkkd_jax import nn


class AdderConv(nn.AdderConv):
    """`pkkd_jax.nn.AdderConv` whose response goes from the l2 to the l1 distance in training.

        y = -sum t |x - w| + (1 - t) (x - w)^2,   t = min(1, passes / steps)

    Later work raises the absolute value to a power that falls from 2 to 1, which costs a power a
    term; the mixture has the same ends, and costs one convolution more until t is 1. The passes
    forward in training, one for each micro-batch, are counted beside BatchNorm's statistics.

    Attributes:
      steps: passes after which the layer is an ordinary adder.
    References:
      After Chen et al., Universal Adder Neural Networks, arXiv 2105.14202, 2021.
    """

    steps: int = 1000

    @linen.compact
    def __call__(self, inputs: Array) -> Array:
        """Maps `[*batch, height, width, c_in]` to `[*batch, height', width', features]`."""
        absolute = super().__call__(inputs)
        passes = self.variable("batch_stats", "passes", jnp.zeros, ())
        share = jnp.minimum(1, passes.value / self.steps).astype(absolute.dtype)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            passes.value += 1
        filters = self.get_variable("params", "filters")
        bias = self.get_variable("params", "bias", 0.0)

        def mixed(inputs, absolute, filters):
            return share * absolute + (1 - share) * (self._squared(inputs, filters) + bias)

        return lax.cond(
            share < 1, mixed, lambda inputs, absolute, filters: absolute, inputs, absolute, filters
        )

    def _squared(self, x: Array, filters: Array) -> Array:
        """-sum (x - w)^2, from ordinary convolutions."""
        if self.feature_group_count > 1:
            raise ValueError(f"feature_group_count={self.feature_group_count}; allowed: 1")

        def convolution(x, w):
            fields = (w.shape[:2], self.strides, self.padding, None, self.kernel_dilation)
            layer = nn.Conv(w.shape[-1], *fields, use_bias=False, parent=None)
            return layer.apply({"params": {"kernel": w}}, x)

        ones = jnp.ones((*filters.shape[:2], 1, 1), x.dtype)
        of_images = convolution(jnp.square(x).sum(-1, keepdims=True), ones)
        return 2 * convolution(x, filters) - of_images - jnp.square(filters).sum((0, 1, 2))
