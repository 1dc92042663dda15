"""The kernels of the CPU: built, chosen, guarded and called from everywhere."""

import shutil
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import implementations

from pkkd_jax.names import UserError
from pkkd_jax.ops import adder, cpu
from pkkd_jax.ops.adder import adder_conv

ROOT = Path(__file__).parent.parent
NATIVE = [name for name in implementations() if name != "portable"]
FLAGS = {"avx512": ["-mavx512f", "-mavx512dq", "-mfma"], "avx2": ["-mavx2", "-mfma"], "neon": []}
SYMBOLS = {"avx512": "kAvx512", "avx2": "kAvx2", "neon": "kNeon"}


def test_the_kernels_were_built_and_the_best_is_chosen():
    assert NATIVE, "no native kernels: install with PKKD_JAX_REQUIRE_NATIVE=1 to see why"
    assert adder.implementation("cpu") == cpu.selected() == NATIVE[0]


def run_check(folder, isa, compiler, shapes, *launcher):
    program = folder / "check"
    sources = [ROOT / "tests/native_check.cc", ROOT / f"pkkd_jax/ops/native/{isa}.cc"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *FLAGS[isa]]
    extra = ["-static"] if launcher else []
    subprocess.run(
        [compiler, *flags, *extra, f"-DISA={SYMBOLS[isa]}", *sources, "-o", program], check=True
    )
    done = subprocess.run([*launcher, program, str(shapes)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "guards intact" in done.stdout


@pytest.mark.skipif(not shutil.which("c++"), reason="needs c++")
@pytest.mark.parametrize("isa", NATIVE)
def test_random_shapes_equal_float64_loops_and_guards_stay_intact(isa, tmp_path):
    run_check(tmp_path, isa, "c++", 25)


@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_compiles_and_runs_under_emulation(tmp_path):
    run_check(tmp_path, "neon", "aarch64-linux-gnu-g++", 8, "qemu-aarch64")


def operands(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    x = jax.random.normal(keys[0], (9, 17, 19, 33))
    return x, jax.random.normal(keys[1], (3, 3, 33, 50))


@jax.jit
def passes(x, w):
    y, vjp = jax.vjp(lambda x, w: adder_conv(x, w, strides=(2, 1)), x, w)
    return (y, *vjp(y))


def test_results_are_bit_identical_from_run_to_run():
    first = passes(*operands())
    for _ in range(20):
        for one, other in zip(first, passes(*operands()), strict=True):
            np.testing.assert_array_equal(one, other)


def test_sums_over_many_places_do_not_lose_what_is_small():
    x, w = np.full((256, 64, 64, 1), 1.3, np.float32), np.zeros((1, 1, 1, 1), np.float32)
    dw = jax.grad(lambda w: adder_conv(x, w).sum())(w)
    np.testing.assert_allclose(dw, x.sum(dtype=np.float64), rtol=5e-6)


def test_many_threads_at_once_get_what_one_gets():
    alone = [passes(*operands(seed)) for seed in range(4)]

    def call(index):
        return jax.device_get(passes(*operands(index % 4)))

    with ThreadPoolExecutor(16) as pool:
        for index, found in enumerate(pool.map(call, range(64))):
            for one, other in zip(alone[index % 4], found, strict=True):
                np.testing.assert_array_equal(one, other)


def test_filters_of_more_taps_than_the_kernels_take_are_portable():
    x, w = operands()
    w = jax.numpy.tile(w, (6, 6, 1, 1))[:17, :16]
    assert w.shape[0] * w.shape[1] > cpu.MAX_TAPS
    lowered = jax.jit(adder_conv).lower(x, w).as_text()
    assert "@pkkd_" not in lowered
    assert "pkkd_forward" in jax.jit(adder_conv).lower(*operands()).as_text()


def select(monkeypatch, name):
    monkeypatch.setenv(cpu.VARIABLE, name)
    cpu.selected.cache_clear()
    try:
        return cpu.selected()
    finally:
        cpu.selected.cache_clear()


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"PKKD_JAX_ADDER=sse: .*avx512, avx2, neon, portable"):
        select(monkeypatch, "sse")


def test_an_instruction_set_that_cannot_run_is_refused(monkeypatch):
    missing = next(name for name in cpu.NATIVE if name not in NATIVE)
    with pytest.raises(UserError, match=f"PKKD_JAX_ADDER={missing}: this processor cannot run it"):
        select(monkeypatch, missing)


def test_without_a_library_the_portable_form_serves_and_no_other_can_be_forced(monkeypatch):
    monkeypatch.setattr(cpu, "_library", lambda: None)
    assert select(monkeypatch, "") == "portable"
    with pytest.raises(UserError, match="no native kernels; install again"):
        select(monkeypatch, "avx2")


def test_main_reports_a_wrong_instruction_set_in_one_line(monkeypatch):
    monkeypatch.setenv(cpu.VARIABLE, "sse")
    done = subprocess.run(
        [sys.executable, "-m", "pkkd_jax.main", "--config=configs/quickstart.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1].startswith("error: PKKD_JAX_ADDER=sse")
    assert "Traceback" not in done.stderr


def build_wheel(folder, monkeypatch, required):
    monkeypatch.setenv("CXX", "/no/compiler")
    monkeypatch.setenv("PKKD_JAX_REQUIRE_NATIVE", required)
    arguments = ["--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", folder]
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ROOT, *arguments], capture_output=True, text=True
    )


def test_without_a_compiler_the_installation_succeeds_with_no_library(tmp_path, monkeypatch):
    done = build_wheel(tmp_path, monkeypatch, "")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pkkd_jax/ops/adder.py" in names
    assert not [name for name in names if "libpkkd" in name or name.endswith((".cc", ".h"))]


def test_without_a_compiler_the_installation_fails_where_kernels_are_required(
    tmp_path, monkeypatch
):
    done = build_wheel(tmp_path, monkeypatch, "1")
    assert done.returncode != 0
    assert "/no/compiler" in done.stdout + done.stderr
    assert not list(tmp_path.glob("*.whl"))
