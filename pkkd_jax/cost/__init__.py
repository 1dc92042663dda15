"""What a network costs at inference: operations, parameters and energy of each layer.

Counted in the trace of the network itself, so that a user's own is counted as well as the
package's. On the command line, for the student of a configuration and its twins:

    python -m pkkd_jax.cost --config=configs/resnet18.py [--json]
"""

from pkkd_jax.cost.figures import ENERGY_PJ, Cost, Layer, Operations
from pkkd_jax.cost.tables import described, line, markdown, notes, text, to_json, totals, write
from pkkd_jax.cost.trace import count
from pkkd_jax.cost.twins import TWINS, twins

__all__ = [
    "ENERGY_PJ",
    "TWINS",
    "Cost",
    "Layer",
    "Operations",
    "count",
    "described",
    "line",
    "markdown",
    "notes",
    "text",
    "to_json",
    "totals",
    "twins",
    "write",
]
