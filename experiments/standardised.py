"""Adder layers whose filters are standardised, as later work does to steady BatchNorm's statistics.

    python -m pkkd_jax.main --config=configs/resnet20.py \\
      --config.student.conv=experiments.standardised.AdderConv
"""

import jax.numpy as jnp
from flax import linen

from pkkd_jax import nn


class AdderConv(nn.AdderConv):
    """`pkkd_jax.nn.AdderConv` that computes with standardised filters.

        w[..., o] = gain[o] * (filters[..., o] - mean) / std

    `gain`, 1 at the start, learns; what is deployed are the filters w.

    References:
      After Dong et al., Towards Stable and Robust AdderNets, NeurIPS 2021.
    """

    def param(self, name, *arguments, **keywords):
        value = super().param(name, *arguments, **keywords)
        if name != "filters":
            return value
        gain = super().param("gain", linen.initializers.ones_init(), value.shape[-1:])
        centred = value - value.mean((0, 1, 2))
        return gain * centred / jnp.sqrt(jnp.square(centred).mean((0, 1, 2)) + 1e-12)
