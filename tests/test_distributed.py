"""Several processes on one machine, connected as hosts of a pod are."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from trainings import MINE, QUICKSTART, ROOT, final, photographs

from pkkd_jax import distributed, main

# Plain convolutions: an adder's clipped gradient carries roundings over its kinks.
STEPS = 20
RUN = [
    f"--config.steps={STEPS}",
    "--config.student.conv=conv",
    "--config.batch_size=32",
    "--config.optim.learning_rate=0.001",
    "--config.eval.recalibrate_batches=2",
    "--config.checkpoint_every_s=0",
]
RESNET = [f"--config={QUICKSTART}", *RUN]
# Compiles in no time.
SMALL = [f"--config={QUICKSTART}:distill=kd,student=mine.Net,teacher=mine.Net", *RUN]


def start(run, workdir, *more, second=()):
    """Two processes of two devices each; `second` are arguments of the second alone."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "pkkd_jax.main", *run, f"--workdir={workdir}", *more,
             f"--coordinator=localhost:{port}", "--process_count=2", f"--process_index={index}",
             *(second if index else ())],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for index in (0, 1)
    ]  # fmt: skip


def ends(processes, timeout=240):
    """Exit statuses and what was printed, `[(status, out, err), ...]`."""
    try:
        texts = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *text) for p, text in zip(processes, texts, strict=True)]


def wait_for_step(workdir, pattern):
    deadline = time.monotonic() + 240
    while not list((workdir / "checkpoints").glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_close_runs(a, b):
    (step_a, parts_a, figures_a), (step_b, parts_b, figures_b) = final(a), final(b)
    assert step_a == step_b == STEPS
    for name, part in parts_a.items():
        assert part.keys() == parts_b[name].keys()
        for key, value in part.items():
            np.testing.assert_allclose(value, parts_b[name][key], rtol=1e-5, atol=1e-5, err_msg=key)
    for key, value in figures_a.items():
        np.testing.assert_allclose(value, figures_b[key], atol=1e-4, err_msg=key)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine` with small networks, for this process and those that it starts."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def small(mine, tmp_path):
    """A run of the small networks in one process with four devices."""
    assert main.main(["main", *SMALL, f"--workdir={tmp_path / 'alone'}"]) == 0
    return tmp_path / "alone"


def test_two_processes_equal_one(tmp_path):
    assert main.main(["main", *RESNET, f"--workdir={tmp_path / 'one'}"]) == 0
    first, other = ends(start(RESNET, tmp_path / "two"))
    assert (first[0], other[0]) == (0, 0), first[2] + other[2]
    assert "4 cpu" in first[1]
    assert "step" not in other[1]
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_a_fixed_teacher_is_the_same_in_every_process(small, tmp_path):
    fixed = ["--config.teacher.mode=fixed", f"--config.teacher.run_dir={small}"]
    assert main.main(["main", *SMALL, f"--workdir={tmp_path / 'one'}", *fixed]) == 0
    found = ends(start(SMALL, tmp_path / "two", *fixed))
    assert [status for status, _, _ in found] == [0, 0], found
    assert_close_runs(tmp_path / "two", tmp_path / "one")


def test_processes_with_other_data_do_not_train(mine, tmp_path):
    for place, count in (("whole", 20), ("in part", 16)):
        photographs(tmp_path / place, count=count)

    def data_dir(place):
        return f"--config.data.data_dir={tmp_path / place}"

    more = ["--config.data.image_size=8", "--config.data.augmentation=crop_flip"]
    run = [f"{SMALL[0]},data=folder", *RUN, *more]
    processes = start(run, tmp_path / "run", data_dir("whole"), second=[data_dir("in part")])
    first, other = ends(processes)
    assert other[0] == 2
    assert "process 1 has another data set than process 0: start all" in other[2]
    assert first[0] in (distributed.LOST, -signal.SIGABRT), first[2]
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_signal_to_one_stops_all_at_one_step_and_one_process_goes_on(small, tmp_path):
    processes = start(SMALL, tmp_path / "run")
    wait_for_step(tmp_path / "run", "[3-9]")
    processes[1].send_signal(signal.SIGTERM)
    found = ends(processes)
    assert [status for status, _, _ in found] == [143, 143], found
    steps = [re.search(r"SIGTERM and saved at step (\d+)", err).group(1) for _, _, err in found]
    assert steps[0] == steps[1]
    assert int(steps[0]) < STEPS
    assert main.main(["main", *SMALL, f"--workdir={tmp_path / 'run'}"]) == 0
    assert_close_runs(tmp_path / "run", small)


@pytest.mark.parametrize("killed", [0, 1])
def test_when_one_is_killed_the_other_ends_and_a_restart_goes_on(killed, small, tmp_path):
    processes = start(SMALL, tmp_path / "run")
    wait_for_step(tmp_path / "run", "[3-9]")
    processes[killed].kill()
    at = time.monotonic()
    ((status, _, err),) = ends([processes[1 - killed]])
    # Whichever sees it first: this program, or JAX's own threads, which abort it.
    assert status in (distributed.LOST, -signal.SIGABRT), err
    assert 128 + signal.SIGABRT == distributed.LOST
    assert "another process is lost" in err or "another task died" in err
    assert time.monotonic() - at < 2 * distributed.HEARTBEAT_S
    processes[killed].communicate()
    assert main.main(["main", *SMALL, f"--workdir={tmp_path / 'run'}"]) == 0
    assert_close_runs(tmp_path / "run", small)
