"""A training killed again and again, which ends with the parameters of one never disturbed.

python benchmarks/soak.py [--kills=25] [--steps=300] [--seed=0] [--config=FILE:ARG]
python benchmarks/soak.py --memory

In seeded random order: SIGKILL, SIGTERM, and SIGKILL with a bit flipped in the newest checkpoint,
each some steps after the start, or before the first step. Every step is saved, so that many a kill
hits a save. The exit status is 1 if the two trainings differ. With --memory it compares instead the
resident size of one training after 500 and after 5,000 steps, on Linux.
"""

import argparse
import collections
import contextlib
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from pkkd_jax import checkpoint

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.py")
FLIP = "SIGKILL and a flipped bit"
KINDS = ("SIGKILL", "SIGTERM", FLIP)


class Training:
    """A running training.

    Attributes:
      process: its process.
      step: the last that it has printed; None before the first line.
      resumed: the step that it has started from.
    """

    def __init__(self, command: list[str]):
        self.step, self.resumed, self.errors = None, 0, []
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.readers = [threading.Thread(target=f) for f in (self._read, self._read_errors)]
        for reader in self.readers:
            reader.start()

    def _read(self):
        for line in self.process.stdout:
            if found := re.search(r"resumed at step (\d+)", line):
                self.resumed = int(found.group(1))
            if found := re.match(r"step (\d+)/", line):
                self.step = int(found.group(1))

    def _read_errors(self):
        self.errors.extend(line.rstrip() for line in self.process.stderr)

    def wait_for_steps(self, count: int) -> None:
        """Returns when it has gone so far, or has ended."""
        while self.process.poll() is None:
            if self.step is not None and self.step >= self.resumed + count:
                return
            time.sleep(0.002)

    def end(self, signum: int | None = None) -> int:
        """Waits for its end, after `signum`, and returns its exit status."""
        if signum is not None:
            self.process.send_signal(signum)
        status = self.process.wait()
        for reader in self.readers:
            reader.join()
        return status


def flip_a_bit(run_dir: Path, rng: random.Random) -> str:
    """Flips one in the arrays of the newest checkpoint; says where, "" if there is no other."""
    steps = [int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdigit()]
    if len(steps) < 2:
        return ""
    folder = run_dir / "checkpoints" / str(max(steps)) / rng.choice(("student", "teacher"))
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"byte {place} of {len(content)} in {path.relative_to(run_dir)}"


def final(run_dir: Path) -> tuple[dict, dict]:
    """Arrays of the last checkpoint, and the test figures."""
    with contextlib.closing(checkpoint.Checkpoints(run_dir, read_only=True)) as checkpoints:
        step = checkpoints.steps()[-1]
        parts = checkpoints.read(step)
    arrays = {f"{name}/{key}": a for name, part in parts.items() for key, a in part.items()}
    results = json.loads((run_dir / "results.json").read_text())
    return arrays, {key: value for key, value in results.items() if key.startswith("test/")}


def soak(config: str, steps: int, kills: int, seed: int, out: Path) -> bool:
    """Runs both trainings in `out`; says whether they end with the same parameters and figures."""
    rng = random.Random(seed)

    def command(run_dir):
        return [sys.executable, "-m", "pkkd_jax.main", f"--config={config}",
                f"--workdir={run_dir}", f"--config.steps={steps}", "--config.log_every_steps=1",
                "--config.checkpoint_every_s=0",
                f"--config.compilation_cache_dir={out / 'cache'}"]  # fmt: skip

    undisturbed, killed = out / "undisturbed", out / "killed"
    reference = Training(command(undisturbed))
    if reference.end():
        raise SystemExit("\n".join(reference.errors))
    done: collections.Counter = collections.Counter()
    recoveries, repeated, reached = [], 0, 0
    while done.total() < kills:
        kind = rng.choice(KINDS)
        # Half of the way that is left for each of the kills to come, on average.
        ahead = max(1, (steps - reached) // (kills - done.total()))
        training, began = Training(command(killed)), time.perf_counter()
        if rng.random() < 0.1:
            time.sleep(rng.uniform(1, 6))
        else:
            training.wait_for_steps(rng.randint(1, ahead))
            recoveries.append(time.perf_counter() - began)
        if training.process.poll() is not None:
            raise SystemExit("it ended by itself:\n" + "\n".join(training.errors))
        status = training.end(signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
        where = flip_a_bit(killed, rng) if kind == FLIP else ""
        kind = "SIGKILL" if kind == FLIP and not where else kind
        done[kind] += 1
        if training.step is not None:
            repeated += max(0, reached - training.resumed)
            reached = max(reached, training.step)
        print(
            f"{done.total():>3} {kind}: from step {training.resumed} to {training.step},"
            f" exit status {status}{', ' if where else ''}{where}",
            flush=True,
        )
        for line in training.errors:
            print(f"    {line}", flush=True)
    last = Training(command(killed))
    if last.end():
        raise SystemExit("\n".join(last.errors))
    for line in last.errors:
        print(f"    {line}")
    (ours, figures), (wanted, wanted_figures) = final(killed), final(undisturbed)
    differing = [key for key in wanted if not np.array_equal(wanted[key], ours.get(key))]
    aside = len(list((killed / "damaged").glob("*")))
    print(f"checkpoints found damaged and set aside: {aside}, of {done[FLIP]} with a flipped bit")
    counts = ", ".join(f"{count} {kind}" for kind, count in done.items())
    print(f"{steps} steps, {done.total()} kills ({counts}), {repeated} steps done again")
    print(f"start to the step of the kill: median {np.median(recoveries):.1f} s")
    print(f"arrays that differ: {len(differing)} of {len(wanted)} {differing[:3] or ''}")
    print(f"test figures: {'equal' if figures == wanted_figures else 'they differ'}")
    return not differing and ours.keys() == wanted.keys() and figures == wanted_figures


def memory(config: str, out: Path) -> bool:
    """Says whether a training's resident size grows by less than 3% from step 500 to 5,000."""
    training = Training(
        [sys.executable, "-m", "pkkd_jax.main", f"--config={config}", f"--workdir={out / 'run'}",
         "--config.steps=5000", "--config.log_every_steps=1"]
    )  # fmt: skip
    sizes = []
    for step in (500, 4950):
        training.wait_for_steps(step)
        samples = []
        while training.process.poll() is None and training.step < step + 50:
            status = Path(f"/proc/{training.process.pid}/status").read_text()
            samples.append(int(re.search(r"VmRSS:\s+(\d+) kB", status).group(1)) / 1000)
            time.sleep(0.02)
        sizes.append(float(np.median(samples)))
    if training.end():
        raise SystemExit("\n".join(training.errors))
    growth = sizes[1] / sizes[0] - 1
    print(f"resident after 500 steps: {sizes[0]:.1f} MB, after 5,000: {sizes[1]:.1f} MB")
    print(f"growth: {growth:.1%}")
    return growth < 0.03


def main() -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0, help="of the order of kills")
    parser.add_argument("--config", default=QUICKSTART, help="FILE or FILE:ARG of the training")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        if given.memory:
            return 0 if memory(given.config, Path(out)) else 1
        return 0 if soak(given.config, given.steps, given.kills, given.seed, Path(out)) else 1


if __name__ == "__main__":
    sys.exit(main())
