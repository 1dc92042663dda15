"""Four CPU devices for every test, set before JAX starts; programs are compiled once a worker."""

import os
import shutil
import subprocess
import sys
import tempfile
from logging import CRITICAL, getLogger

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()

import jax
import pytest
from absl import logging
from trainings import command, start

from pkkd_jax import main
from pkkd_jax.names import UserError
from pkkd_jax.ops import cpu, primitive

# Python 3.11 may fail where two threads format tracebacks at once: Orbax's do, of what is damaged.
logging.set_verbosity(logging.FATAL)
getLogger("asyncio").setLevel(CRITICAL)


def pytest_unconfigure():
    shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Drops what a file compiled: all files' programs together take more than the 65,530 memory
    maps that Linux grants a process, which then ends in the middle of the next one."""
    yield
    jax.clear_caches()


def implementations() -> list[str]:
    """What can be forced on this machine."""
    found = []
    for name in (*cpu.NATIVE, "portable"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(cpu.VARIABLE, name)
            cpu.selected.cache_clear()
            try:
                found.append(cpu.selected())
            except UserError:
                continue
    cpu.selected.cache_clear()
    return found


@pytest.fixture(scope="module")
def implementation(request):
    """Forces one of `implementations`, for programs compiled in the tests."""

    def forget():
        cpu.selected.cache_clear()
        primitive.compiled.cache_clear()
        jax.clear_caches()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cpu.VARIABLE, request.param)
        forget()
        yield request.param
    forget()
    cpu.selected()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own and what changes its options; only root can make one."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)

    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux")
    mount("size=400k")
    yield disk, mount
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run that was never stopped, on one device, and what it printed."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    process = start(workdir)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return workdir, out


@pytest.fixture(scope="session")
def kernel_run(tmp_path_factory):
    """A run of PKKD with the checkpoints of three evaluations, pictured at the second."""
    run_dir = tmp_path_factory.mktemp("runs") / "kernel"
    more = ["--config.eval.every_epochs=0.05", "--config.eval.pictures=2"]
    assert main.main(command(run_dir, "--config.keep_evaluated=True", *more)) == 0
    return run_dir


@pytest.fixture(scope="session")
def no_kernel_run(tmp_path_factory):
    """A run of PKKD without kernels."""
    run_dir = tmp_path_factory.mktemp("runs") / "no_kernel"
    assert main.main(command(run_dir, "--config.distill.pkkd.kernel=False")) == 0
    return run_dir


@pytest.fixture(scope="session")
def alone_run(tmp_path_factory):
    """A run without a teacher."""
    run_dir = tmp_path_factory.mktemp("runs") / "alone"
    line = command(run_dir, "--config.teacher.mode=none")
    assert main.main([line[0], f"{line[1]}:distill=none", *line[2:]]) == 0
    return run_dir
