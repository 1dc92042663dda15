"""What a step frees is there for the next one."""

import subprocess
import sys

import pytest

from pkkd_jax import memory

PROGRAM = """
import resource, statistics, sys
from pkkd_jax import memory
if sys.argv[1] == "keep":
    memory.keep()
import jax, jax.numpy as jnp
made = jax.lax.optimization_barrier
step = jax.jit(lambda x: made(made(jnp.sin(x))[::-1] * 2).sum())  # with temporaries of 64 MB
x = jnp.ones(1 << 24)
def faults():
    step(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults() for _ in range(12)]
changes = [after - before for before, after in zip(counts, counts[1:])]
print(statistics.median(changes[1:]))  # now and then a call finds the heap otherwise divided
"""


@pytest.mark.skipif(not hasattr(memory.LIBC, "mallopt"), reason="a C library without mallopt")
def test_a_step_faults_no_page_of_its_temporaries_in_again():
    def faults(word):
        command = [sys.executable, "-c", PROGRAM, word]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults("leave") > 10_000
    assert faults("keep") < 1_000
