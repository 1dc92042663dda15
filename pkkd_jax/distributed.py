"""Processes that train together, one for each host (or accelerator)."""

import os
import sys
import zlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pkkd_jax.names import UserError

HEARTBEAT_S = 30  # without a sign of life, after which a process counts as lost
# Exit status when another process is lost: start all of them again. It is that of an abort, by
# which JAX's own threads end the program where they are the first to notice.
LOST = 134


def initialize(coordinator: str = "", count: int | None = None, index: int | None = None) -> None:
    """Joins the processes that train together, before anything touches a device.

    Where the environment describes them (Cloud TPU, Slurm, Kubernetes, Open MPI; JAX detects it),
    nothing need be given; without it, and with nothing given, this process trains alone. So it
    does, with nothing given, in a program that has used JAX before.

    Args:
      coordinator: `HOST:PORT` at which the first process listens.
      count: of the processes; 1 keeps this one alone, whatever the environment says.
      index: of this process, from 0.
    Raises:
      UserError: if they do not describe such processes, or these do not meet.
    """
    if count is not None and count < 1:
        raise UserError(f"--process_count={count}: it must be 1 or more")
    if count == 1 or jax.distributed.is_initialized():
        return
    if coordinator and (":" not in coordinator or not coordinator.rpartition(":")[2].isdigit()):
        raise UserError(f"--coordinator={coordinator}: expected HOST:PORT of the first process")
    given = [bool(coordinator), count is not None, index is not None]
    if any(given) and not all(given):
        raise UserError(
            "--coordinator, --process_count and --process_index belong together: give all three,"
            " or none where the environment describes the processes"
        )
    if all(given) and not 0 <= index < count:
        raise UserError(f"--process_index={index}: it must be from 0 to {count - 1}")
    try:
        jax.distributed.initialize(
            coordinator or None, count, index, heartbeat_timeout_seconds=HEARTBEAT_S
        )
    except (ValueError, RuntimeError) as error:
        # Nobody describes other processes, or a program has used JAX on its own before.
        alone = ("coordinator_address should be defined", "must be called before any JAX")
        if any(given) or not any(text in str(error) for text in alone):
            raise _no_meeting(error) from error
    except Exception as error:  # whatever the environment's detection, or the network, raises
        raise _no_meeting(error) from error


def _no_meeting(error: Exception) -> UserError:
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"the processes cannot meet ({type(error).__name__}: {text}): check --coordinator,"
        " --process_count and --process_index; --process_count=1 trains in this process alone"
    )


def several() -> bool:
    """Whether there are other processes."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """The first process's `tree`, whose structure and shapes every process gives."""
    return multihost_utils.broadcast_one_to_all(tree) if several() else tree


def require_same(text: str, what: str) -> None:
    """Refuses processes that were given different texts.

    Raises:
      UserError: in every process that differs from the first.
    """
    mine = np.uint32(zlib.crc32(text.encode()))
    if from_first(mine) != mine:
        raise UserError(
            f"process {jax.process_index()} has another {what} than process 0: start all processes"
            " with the same command and data"
        )


def is_loss(error: Exception) -> bool:
    """Whether `error` says that another process is gone, and not that this one is at fault."""
    own = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT", "UNIMPLEMENTED")
    return isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith(own)


def leave_at_once(status: int) -> None:
    """Ends this process without waiting for others, which may wait for it, or be gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
