"""What a training holds: teacher, student and distiller, as pure trees."""

from typing import Any

from flax import struct


@struct.dataclass
class NetworkState:
    """One network, or the learnable parts of the losses (whose `batch_stats` are empty)."""

    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """For `model.apply`."""
        return {"params": self.params, "batch_stats": self.batch_stats}


@struct.dataclass
class DistillState:
    """Both networks and the distiller after `step` updates; `teacher` is None if there is none."""

    step: Any
    student: NetworkState
    teacher: NetworkState | None
    distiller: NetworkState
