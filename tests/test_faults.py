"""What goes wrong in a training: signals, kills, numbers, disks, data; nothing is lost."""

import builtins
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from trainings import MINE, QUICKSTART, ROOT, assert_same_run, command, final, start

from pkkd_jax import (
    analysis,
    checkpoint,
    data,
    evaluate,
    evaluation,
    main,
    metrics,
    stopping,
    train,
    update,
)
from pkkd_jax.names import UserError


def test_killed_in_mid_run_and_resumed_equals_never_stopped(finished, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, "--config.steps=12")
    while process.poll() is None and not list((workdir / "checkpoints").glob("[4-9]")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL  # it had not finished
    again = start(workdir)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resumed at step" in out
    assert_same_run(workdir, finished[0])


def test_stopped_by_a_signal_saves_says_how_to_go_on_and_resumes_bit_for_bit(finished, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "SIGTERM" in err
    assert "the same command goes on" in err
    again = start(workdir)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resumed at step" in out
    assert_same_run(workdir, finished[0])
    (place,) = json.loads((workdir / "results.json").read_text())["starts"]
    assert place["step"] == 0


def test_a_signal_is_obeyed_at_the_next_step(tmp_path):
    def stop(figures):
        os.kill(os.getpid(), signal.SIGINT)

    config, workdir, _ = main.parse(command(tmp_path / "run"))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(stopping.Interrupted) as stopped:
        train.train_and_evaluate(config, workdir, at_interval=stop)
    assert stopped.value.step == 1
    checkpoints = checkpoint.Checkpoints(workdir)
    assert checkpoints.steps() == [1]
    checkpoints.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_is_obeyed_while_evaluating_which_is_made_up_for(finished, tmp_path, monkeypatch):
    more = ["--config.eval.every_epochs=0.05", "--config.keep_evaluated=True"]  # 4.5 steps
    config, workdir, _ = main.parse(command(tmp_path / "run", *more))
    whole = evaluation.evaluate

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", interrupted)
    with pytest.raises(stopping.Interrupted) as stopped:
        train.train_and_evaluate(config, workdir)
    assert stopped.value.step == 4
    monkeypatch.undo()
    train.train_and_evaluate(config, workdir)
    rows = metrics.read(workdir)
    found = {r["step"]: r["test/student/accuracy"] for r in rows if "test/student/accuracy" in r}
    assert list(found) == [4, 8, 12]
    # The checkpoint of the signal has its accuracy, for processes to come too.
    checkpoints = checkpoint.Checkpoints(workdir, read_only=True)
    assert checkpoints._accuracies == found
    checkpoints.close()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, capsys):
    workdir = tmp_path / "run"
    # The first rate is harmless, the warm-up brings it to 1e38 in a few steps.
    explode = ["--config.optim.learning_rate=1e38", "--config.optim.warmup_steps=6"]
    assert main.main(command(workdir, *explode)) == 2
    error = capsys.readouterr().err
    assert re.search(r"step \d+: the (teacher|student)'s response of stem is not finite", error)
    assert error.count("\n") == 1
    checkpoints = checkpoint.Checkpoints(workdir)
    assert checkpoints.steps()
    for step in checkpoints.steps():
        for value in checkpoints.read(step)["student"].values():
            assert np.isfinite(value).all()
    checkpoints.close()


def test_a_disk_too_full_for_a_checkpoint_is_one_clear_line(small_disk, capsys):
    workdir = small_disk[0] / "run"
    assert main.main(command(workdir)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
    assert not (workdir / "results.json").exists()


def test_a_directory_without_permission_is_one_clear_line(small_disk, capsys):
    disk, mount = small_disk
    mount("remount,ro")
    assert main.main(command(disk / "run")) == 2
    error = capsys.readouterr().err
    assert "Read-only file system" in error
    assert error.count("\n") == 1


def test_a_directory_that_becomes_unwritable_ends_the_run_which_goes_on_later(finished, tmp_path):
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root on Linux")
    workdir = tmp_path / "run"
    process = start(workdir)
    while process.poll() is None and not list((workdir / "checkpoints").glob("[2-9]")):
        time.sleep(0.01)
    place = workdir / "checkpoints"
    subprocess.run(["mount", "--bind", place, place], check=True)
    while subprocess.run(["mount", "-o", "remount,bind,ro", place]).returncode:
        assert process.poll() is None  # refused while a file there is being written
    _, err = process.communicate()
    subprocess.run(["umount", place], check=True)
    assert process.returncode == 2, err
    assert "Read-only file system" in err.splitlines()[-1]
    assert "Traceback" not in err
    again = start(workdir)
    out, err = again.communicate()
    assert again.returncode == 0, err
    assert "resumed at step" in out
    assert_same_run(workdir, finished[0])


NETS = "student=mine.Net,teacher=mine.Net"  # compile in no time
SMALL = f"--config={QUICKSTART}:distill=kd,{NETS}"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes the networks `mine.Net` and the data set `mine.Stuck` importable."""
    (tmp_path / "mine.py").write_text(MINE + STUCK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.fixture
def poisoned(own, monkeypatch):
    """Makes the student's cross-entropy NaN in the updates 5 and 7."""
    terms_of = update.loss_terms

    def changed(recipe):
        terms = terms_of(recipe)

        def terms_with_nan(params, stats, step, *arguments):
            found, auxiliary = terms(params, stats, step, *arguments)
            bad = jnp.isin(step, jnp.array([4, 6]))
            return found | {"ce": jnp.where(bad, jnp.nan, 1) * found["ce"]}, auxiliary

        return terms_with_nan

    monkeypatch.setattr(update, "loss_terms", changed)


def test_updates_that_are_not_finite_are_left_out_up_to_a_limit(poisoned, tmp_path, capsys):
    workdir = tmp_path / "run"
    assert main.main(command(workdir, SMALL, "--config.skip_not_finite=2", "--config.steps=5")) == 0
    error = capsys.readouterr().err
    assert error == (
        "warning: step 5: the student's loss ce is not finite; update 1 of at most 2 left out\n"
    )
    checkpoints = checkpoint.Checkpoints(workdir)
    assert checkpoints.steps() == [4, 5]
    before, after = (checkpoints.read(step) for step in (4, 5))
    for name, part in before.items():
        for key, value in part.items():
            np.testing.assert_array_equal(value, after[name][key])
    checkpoints.close()
    workdir = tmp_path / "longer"
    assert main.main(command(workdir, SMALL, "--config.skip_not_finite=2")) == 0
    assert "step 7: the student's loss ce is not finite; update 2 of" in capsys.readouterr().err
    assert metrics.read(workdir)[-1]["step"] == 12
    assert max(row.get("train/skipped_updates", 0) for row in metrics.read(workdir)) == 2
    for value in final(workdir)[1]["student"].values():
        assert np.isfinite(value).all()


def test_one_update_too_many_that_is_not_finite_ends_the_run(poisoned, tmp_path, capsys):
    assert main.main(command(tmp_path / "run", SMALL, "--config.skip_not_finite=1")) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "step 7: the student's loss ce is not finite; the checkpoint of step 6 is kept" in error
    assert "config.skip_not_finite (now 1)" in error


STUCK = """
import time
import numpy as np


class Stuck:
    num_classes, image_shape, mean, std = 10, (8, 8, 1), (0.0,), (1.0,)
    augmentation = "resized_crop"

    def __init__(self, split, data_dir):
        self.read = 0

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.read += 1
        if self.read > 164:  # 64 are read to know the data set by
            time.sleep(1000)
        return {"image": np.zeros((8, 8, 1), np.uint8), "label": index % 10}
"""


def test_a_run_that_is_stuck_ends_with_the_stack_of_every_thread(own, tmp_path):
    process = start(tmp_path / "run", f"{SMALL},data=mine.Stuck", "--config.watchdog_s=30")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "step 3/12" in out
    assert "Timeout (0:00:30)!" in err
    assert "in __getitem__" in err  # where it is stuck
    assert "in train_and_evaluate" in err
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_what_a_run_directory_names_is_neither_imported_nor_executed(
    finished, tmp_path, monkeypatch
):
    run_dir = shutil.copytree(finished[0], tmp_path / "run")
    written = (run_dir / "config.json").read_text()
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('executed')")
    monkeypatch.syspath_prepend(tmp_path)
    pickled = b"cbuiltins\nexec\n(S'raise SystemExit'\ntR."
    analysis.load(run_dir)  # imports what it needs, as the next line does
    data.open_source("train", name="digits")

    def refuse(*arguments, **keywords):
        raise SystemExit("executed")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"),
                         (builtins, "eval"), (builtins, "exec")):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    checkpoint.load_network(run_dir)
    for name in ("evil.Net", "os.system", "builtins.eval", "..evil", "evil"):
        config = json.loads(written)
        config["student"] = {"name": name, "conv": "adder"}
        (run_dir / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError):
            checkpoint.load_network(run_dir)
        assert evaluate.main([str(run_dir)]) == 2
    config = json.loads(written)
    config["student"]["conv"] = "evil.conv"
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        checkpoint.load_network(run_dir)
    config = json.loads(written)  # whose teacher is built of the student's keywords
    config["teacher"]["mode"] = "snapshot"
    config["student"]["name"] = "evil.Net"
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"evil\.Net.*outside"):
        checkpoint.load_network(run_dir, "teacher")
    config = json.loads(written)
    config["distill"] = {"os": {"system": {"weight": 1.0, "command": "exit"}}, "name": "kd"}
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"os\.system.*outside"):
        analysis.load(run_dir)
    (run_dir / "config.json").write_text(written)
    for path in (run_dir / "checkpoints" / "12").rglob("*"):
        if path.is_file():
            path.write_bytes(pickled)
    with pytest.warns(UserWarning, match="step 12 .* is damaged"):
        checkpoint.load_network(run_dir)
    for path in (run_dir / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(pickled)
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(UserError, match=r"no checkpoint in .* is intact"),
    ):
        checkpoint.load_network(run_dir)


def test_five_kills_in_a_short_soak_change_nothing(own):
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--kills=5", "--steps=60"]
    run = subprocess.run(
        [*command, f"--config={SMALL.partition('=')[2]}"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "5 kills" in run.stdout
    assert "arrays that differ: 0 of" in run.stdout
