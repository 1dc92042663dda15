"""Checkpoints: `store`, a run's own, written and read by Orbax; `load`, networks out of any run."""

from pkkd_jax.checkpoint.load import (
    fill,
    load_network,
    load_parts,
    load_state,
    saved_steps,
    variables,
)
from pkkd_jax.checkpoint.store import DISK_ERRORS, PARTS, Checkpoints, Damaged, Flat

__all__ = [
    "DISK_ERRORS",
    "PARTS",
    "Checkpoints",
    "Damaged",
    "Flat",
    "fill",
    "load_network",
    "load_parts",
    "load_state",
    "saved_steps",
    "variables",
]
