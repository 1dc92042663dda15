"""Where results come from."""

import os
import platform
import re
import subprocess
from importlib import metadata

import pytest

from pkkd_jax import provenance


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    version = metadata.version("pkkd_jax")
    package = tmp_path / "checkout" / "pkkd_jax"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    assert provenance.version() == version
    git = ["git", "-C", str(tmp_path / "checkout"), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-qm", "first", "--allow-empty"], check=True)
    assert re.fullmatch(rf"{re.escape(version)} \([0-9a-f]+\)", provenance.version())
    inside = tmp_path / "checkout" / "site-packages" / "pkkd_jax" / "provenance.py"
    inside.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(inside))
    assert provenance.version() == version


def test_a_training_that_goes_on_elsewhere_names_both_places(tmp_path, monkeypatch):
    def origin(device, commit):
        return {"device": device, "versions": {"jax": "0.1", "pkkd_jax": commit}}

    def start(step, device, commit):
        monkeypatch.setattr(provenance, "origin", lambda: origin(device, commit))
        return provenance.history(tmp_path, step)

    assert start(0, "gpu", "a") == [{"step": 0, **origin("gpu", "a")}]
    assert start(0, "tpu", "a") == [{"step": 0, **origin("tpu", "a")}]  # none was saved before
    assert start(600, "tpu", "a") == [{"step": 0, **origin("tpu", "a")}]
    assert start(1200, "tpu", "b")[1:] == [{"step": 1200, **origin("tpu", "b")}]
    found = start(2000, "cpu", "b")
    assert [(each["step"], each["device"]) for each in found] == [
        (0, "tpu"), (1200, "tpu"), (2000, "cpu")
    ]  # fmt: skip
    assert len(start(1800, "tpu", "b")) == 2  # what came after the checkpoint was lost
    for damaged in ("", "[1]", '{"a": 1}', '[{"step": 0}]', "5"):
        (tmp_path / "starts.json").write_text(damaged)
        assert start(0, "cpu", "b") == [{"step": 0, **origin("cpu", "b")}]
        (tmp_path / "starts.json").write_text(damaged)
        found = [(each["step"], each["device"]) for each in start(2000, "cpu", "b")]
        assert found == [(0, "unknown"), (2000, "cpu")]


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity"), reason="processes cannot be held to cores"
)
def test_the_device_says_which_processor_and_how_many_cores_were_used():
    cpus = f"4 cpu ({provenance.processor()})"
    all_cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(all_cores)})
        assert provenance.origin()["device"].startswith(f"{cpus}, 1 core, adder op")
    finally:
        os.sched_setaffinity(0, all_cores)
    assert provenance.origin()["device"].startswith(f"{cpus}, {len(all_cores)} core")


def test_a_processor_without_a_name_has_its_architecture(monkeypatch):
    assert provenance.processor()
    monkeypatch.setattr(provenance.Path, "read_text", lambda path: "processor : 0\n")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert provenance.processor() == platform.machine()
