"""Where results come from: versions, commit and device."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import jax

from pkkd_jax import metrics
from pkkd_jax.ops import adder


def version() -> str:
    """The package's version, and the commit, `0.1.0 (1a2b3c4)`, where it is run from its checkout.

    Where files differ from the commit, "-dirty" stands behind it.
    """
    found, place = metadata.version("pkkd_jax"), Path(__file__).resolve().parent.parent

    def git(*arguments):
        command = ["git", "-C", str(place), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != place:
            return found  # installed inside the repository of another project
        return f"{found} ({git('describe', '--always', '--dirty')})"
    except (OSError, subprocess.CalledProcessError):
        return found


def processor() -> str:
    """What the operating system calls the processor, or else its architecture."""
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:  # it is Linux' alone
        named = None
    return named[1] if named else platform.processor() or platform.machine()


def history(run_dir: Path, step: int) -> list[dict]:
    """Where a training is made that starts now at `step`, and where it was made before.

    It is kept in `starts.json`; what is damaged or not there is "unknown".

    Returns:
      `origin` with its first "step", 0 or later, for each start that changed anything.
    """
    path, now = run_dir / "starts.json", origin()
    try:
        starts = [
            {"step": int(each["step"]), "device": each["device"], "versions": each["versions"]}
            for each in metrics.read_json(path)
            if each["step"] < step and each["versions"].keys() == now["versions"].keys()
        ]
    except (AttributeError, KeyError, TypeError, ValueError):
        starts = []
    if step and not (starts and starts[0]["step"] == 0):
        unknown = {"device": "unknown", "versions": dict.fromkeys(now["versions"], "unknown")}
        starts.insert(0, {"step": 0, **unknown})
    if not starts or starts[-1] != {"step": starts[-1]["step"], **now}:
        starts.append({"step": step, **now})
    metrics.write_json(path, starts)
    return starts


def origin() -> dict:
    """Versions and device of this process."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax")}
    device = f"{jax.device_count()} {jax.devices()[0].device_kind}"
    if jax.default_backend() == "cpu":
        # Of those that the machine has, a process may be held to some.
        own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        device += f" ({processor()}), {own} core{'s' * (own != 1)}"
    return {
        "versions": {**versions, "pkkd_jax": version()},
        "device": f"{device}, adder op: {adder.implementation()}",
    }
