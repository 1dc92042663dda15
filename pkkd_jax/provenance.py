"""Where results come from: versions, commit and device."""

import itertools
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


def history(run_dir: Path, step: int) -> dict:
    """What `results.json` says of where a training was made, by all of its starts.

    This start, at `step`, is added to those in `starts.json`.

    Returns:
      As `origin`; what changed on the way is "A, to step 1,000, then B", and "unknown" where it is
      not there or damaged.
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
    starts.append({"step": step, **now})
    metrics.write_json(path, starts)

    def along(values):
        text = values[0]
        for start, (before, after) in zip(starts[1:], itertools.pairwise(values), strict=True):
            text += f", to step {start['step']:,}, then {after}" if after != before else ""
        return text

    return {
        "versions": {
            name: along([each["versions"][name] for each in starts]) for name in now["versions"]
        },
        "device": along([each["device"] for each in starts]),
    }


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
