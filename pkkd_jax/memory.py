"""Memory that is kept from step to step, for programs that train on CPU under glibc."""

import ctypes
import sys

import jax

LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def keep() -> None:
    """Keeps the memory that a step frees for the next one: call it before JAX touches a device.

    Given back to the system, it would be cleared page by page in every step. XLA takes it in the
    thread that runs the step: in the caller's, whose heap nothing else cuts up, if JAX dispatches
    synchronously. It is set for the whole process; on other systems nothing but the dispatch is.
    Other threads share one heap besides: with one each, every checkpoint would leave some unused.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if hasattr(LIBC, "mallopt"):
        LIBC.mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        LIBC.mallopt(-8, 2)  # M_ARENA_MAX
        LIBC.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap does not shrink by itself


def trim() -> None:
    """Gives back to the system what is free now, for example after a compilation."""
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(ctypes.c_size_t(0))
