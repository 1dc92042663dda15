"""Checkpoints under every damage: the very values that were saved, or an older checkpoint."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pkkd_jax import checkpoint
from pkkd_jax.checkpoint import store
from pkkd_jax.names import UserError
from pkkd_jax.state import DistillState, NetworkState

SHAPES = {"stem": (3, 3, 1, 8), "block": (41, 7), "scale": ()}


def state(step, size=1):
    """A state whose values are a function of its step."""

    def network(seed):
        rng = np.random.default_rng((step, seed))
        params = {k: rng.random(tuple(size * n for n in v), np.float32) for k, v in SHAPES.items()}
        counts = {"count": np.int32(step), "trace": params}
        return NetworkState(params, {"mean": params["block"]}, counts)

    return DistillState(np.int32(step), network(1), network(2), NetworkState({}, {}, {}))


def assert_is_state(found, size=1):
    """That `found` of `newest` is the whole state of its step."""
    step, parts = found
    restored = checkpoint.fill(state(0, size), step, parts)
    wanted = state(step, size)
    assert int(restored.step) == step
    for name in ("student", "teacher"):
        one, other = (store._flatten(getattr(each, name)) for each in (restored, wanted))
        assert one.keys() == other.keys()
        for key, value in one.items():
            np.testing.assert_array_equal(value, other[key])


def opened(run_dir, read_only=False):
    return contextlib.closing(checkpoint.Checkpoints(run_dir, read_only))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run directory with the checkpoints of steps 5 and 9."""
    run_dir = tmp_path_factory.mktemp("saved") / "run"
    with opened(run_dir) as checkpoints:
        checkpoints.save(state(5), accuracy=0.5)
        checkpoints.save(state(9), accuracy=0.4)
    return run_dir


def files_of(run_dir, step=9):
    return sorted(p for p in (run_dir / "checkpoints" / str(step)).rglob("*") if p.is_file())


def largest(paths):
    return max(paths, key=lambda path: path.stat().st_size)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    content = bytearray(path.read_bytes())
    rng = np.random.default_rng(len(content))
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    path.write_bytes(content)


DAMAGES = {
    "truncated": truncate,
    "one bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}


@pytest.mark.filterwarnings("ignore:the checkpoint of step 9 is damaged")
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_gives_what_was_saved_or_the_checkpoint_before(damage, saved, tmp_path):
    steps = set()
    for number, path in enumerate(files_of(saved)):
        run_dir = shutil.copytree(saved, tmp_path / str(number))
        DAMAGES[damage](run_dir / path.relative_to(saved))
        with opened(run_dir) as checkpoints:
            found = checkpoints.newest()
            assert_is_state(found)
            steps.add(found[0])
            if found[0] == 5:  # step 9 can be saved again
                assert checkpoints.steps() == [5]
                assert (run_dir / "damaged" / "9").is_dir()
                checkpoints.save(state(9))
                checkpoints.wait()
                assert checkpoints.newest()[0] == 9
    assert 5 in steps


def test_a_damaged_checkpoint_is_named_with_the_reason_and_set_aside(saved, tmp_path):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    truncate(largest(files_of(run_dir)))
    with opened(run_dir) as checkpoints:
        with pytest.warns(UserWarning, match=r"step 9 is damaged \(.+\); it is moved to '.+9' and"):
            assert checkpoints.newest()[0] == 5
        assert checkpoints.best_step() == 5


def test_every_flipped_bit_of_an_array_is_noticed(saved, tmp_path):
    """Wherever it is: 60 places in the file that holds a network's arrays."""
    rng = np.random.default_rng(0)
    with opened(saved) as checkpoints:
        wanted = checkpoints.read(9)["student"]
    run_dir = shutil.copytree(saved, tmp_path / "run")
    data = largest(p for p in files_of(run_dir) if "student" in p.parts)
    content = data.read_bytes()
    noticed = 0
    for place in rng.integers(len(content), size=60):
        changed = bytearray(content)
        changed[place] ^= 1 << rng.integers(8)
        data.write_bytes(changed)
        with opened(run_dir, read_only=True) as checkpoints:
            try:
                found = checkpoints.read(9)["student"]
            except checkpoint.Damaged:
                noticed += 1
                continue
        for key, value in found.items():
            np.testing.assert_array_equal(value, wanted[key])
    assert noticed


def test_a_step_directory_that_is_empty_is_set_aside(saved, tmp_path):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    (run_dir / "checkpoints" / "12").mkdir()
    with opened(run_dir) as checkpoints:
        with pytest.warns(UserWarning, match="step 12 is damaged"):
            assert_is_state(checkpoints.newest())
        checkpoints.save(state(12))
        checkpoints.wait()
        assert_is_state(checkpoints.newest())
        assert checkpoints.steps()[-1] == 12


def test_where_all_are_damaged_the_run_is_refused_and_nothing_is_moved(saved, tmp_path):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    for step in (5, 9):
        for path in files_of(run_dir, step):
            truncate(path)
    with opened(run_dir) as checkpoints:
        with pytest.raises(UserError, match=r"no checkpoint .* is intact \(step 9: .*--workdir"):
            checkpoints.newest()
        assert checkpoints.steps() == [5, 9]
    assert not (run_dir / "damaged").exists()


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    with opened(tmp_path) as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, None, 0.4, None], 1):
            checkpoints.save(state(step), accuracy)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
    with opened(tmp_path) as checkpoints:  # what was best is known from the files
        assert checkpoints.best_step() == 2
        checkpoints.save(state(7), 0.8)
        checkpoints.wait()
        assert checkpoints.steps() == [2, 6, 7]


def test_every_evaluated_one_is_kept_where_asked_for(tmp_path):
    with contextlib.closing(checkpoint.Checkpoints(tmp_path, keep_evaluated=True)) as checkpoints:
        for step, accuracy in enumerate([0.1, 0.9, 0.3, None, 0.4, None, None], 1):
            checkpoints.save(state(step), accuracy)
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2, 3, 5, 6, 7]


SAVER = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
import test_checkpoint as test

with test.opened(Path({run_dir!r})) as checkpoints:
    found = checkpoints.newest()
    step = found[0] if found else 0
    while True:
        step += 1
        checkpoints.save(test.state(step, 16))
        checkpoints.wait()
        print(step, flush=True)
"""


def test_killed_at_any_moment_of_a_save_loses_nothing_that_was_finished(tmp_path):
    rng = np.random.default_rng(0)
    script = SAVER.format(folder=str(Path(__file__).parent), run_dir=str(tmp_path / "run"))
    last = 0
    for _ in range(5):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        first = int(process.stdout.readline())
        try:
            process.wait(rng.uniform(0, 0.3))
        except subprocess.TimeoutExpired:
            process.kill()
        finished = [first, *map(int, process.communicate()[0].split())][-1]
        assert process.returncode == -signal.SIGKILL
        assert first > last
        with opened(tmp_path / "run") as checkpoints:
            found = checkpoints.newest()
        assert finished <= found[0] <= finished + 1
        assert_is_state(found, 16)
        last = finished


@pytest.fixture
def small_run(small_disk):
    """A run directory with a checkpoint of step 1, beside which a large one has no space."""
    disk, mount = small_disk
    mount("remount,size=8m")
    with opened(disk / "run") as checkpoints:
        checkpoints.save(state(1))
    return disk / "run"


def test_a_disk_that_fills_up_in_mid_save_loses_no_older_checkpoint(small_run, monkeypatch):
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: NoLimit)

    def fill():
        with opened(small_run) as checkpoints:
            checkpoints.save(state(2, 20))

    with pytest.raises(OSError, match="No space left"):
        fill()
    with opened(small_run) as checkpoints:
        assert_is_state(checkpoints.newest())
        assert checkpoints.steps() == [1]
        checkpoints.save(state(2))
        checkpoints.wait()
        assert checkpoints.newest()[0] == 2


class NoLimit:
    free = 2**60


def test_a_disk_too_full_is_noticed_before_anything_is_written(small_run):
    with opened(small_run) as checkpoints:
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(state(2, 20))
        assert checkpoints.steps() == [1]


def test_a_network_comes_from_the_newest_intact_checkpoint(saved, tmp_path, monkeypatch):
    run_dir = shutil.copytree(saved, tmp_path / "run")
    before = files_of(run_dir, 5)
    truncate(largest(files_of(run_dir)))
    with pytest.warns(UserWarning, match="step 9 .* is damaged"):
        restored = checkpoint.load_state(run_dir, state(0))
    assert int(restored.step) == 5
    with pytest.raises(UserError, match=r"step 9 .* is damaged .*choose another of \[5, 9\]"):
        checkpoint.load_state(run_dir, state(0), 9)
    assert int(checkpoint.load_state(run_dir, state(0), "best").step) == 5
    assert files_of(run_dir, 5) == before
    assert not (run_dir / "damaged").exists()  # reading changes nothing
