"""Where results come from: versions, commit and device."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import jax

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


def origin() -> dict:
    """What `results.json` says of where the last start of a training was made."""
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
