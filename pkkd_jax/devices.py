"""Work on all devices of this process at once: the only call of `jax.pmap`."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "batch"


def pmap(function: Callable, *constants: Any, donate: bool = False) -> Callable:
    """Maps `function(state, batch, *constants)` over the devices: makes `(state, batch) -> tree`.

    `batch` is split, the rest is not; `constants` are the same trees at every call. Results
    must be equal on every device: they come back without a leading device axis.
    """
    mapped = jax.pmap(
        function,
        axis_name=AXIS,
        in_axes=(None, 0, *(None for _ in constants)),
        out_axes=None,
        donate_argnums=(0,) if donate else (),
    )
    constants = replicate(constants)
    return lambda state, batch: mapped(state, batch, *constants)


def replicate(tree: Any) -> Any:
    """Puts `tree` on every device of this process, so that the first step compiles for all."""
    sharding = NamedSharding(Mesh(np.array(jax.local_devices()), (AXIS,)), PartitionSpec())
    return jax.tree.map(lambda a: jax.device_put(a, sharding), tree)


def largest(state, wishes):
    """The largest of all devices' `wishes`, to be mapped by `pmap`; there is no `state`."""
    del state
    return lax.pmax(wishes, AXIS)
