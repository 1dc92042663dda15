"""What keeping trainings safe costs: saving, verifying, and starting again.

python benchmarks/checkpoints.py [--data_dir DIR]

One process measures saves and reads of a ResNet-20 PKKD state; others are started with an empty and
a filled compilation cache, new and resumed, and timed until their first step is printed. With
--data_dir they train ResNet-20 on CIFAR-10, else the quickstart.
"""

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from pkkd_jax import checkpoint, config, distill, models, optim
from pkkd_jax.checkpoint import store
from pkkd_jax.recipe import Recipe, init_state

REPEATS = 5
CONFIGS = Path(__file__).parent.parent / "configs"


def resnet20_state():
    """The state of `configs/resnet20.py`, with momentum as after a step."""
    leaves = config.base()
    losses = distill.build(leaves.distill.to_dict(), 1000)
    networks = {
        name: models.build("resnet_cifar", depth=20, num_classes=10, conv=conv)
        for name, conv in (("student", "adder"), ("teacher", "conv"))
    }
    optimiser = optim.build(1000, momentum=0.9)
    recipe = Recipe(
        **networks, teacher_learns=True, losses=losses, alpha=1.0, optimiser=optimiser,
        distiller_optimiser=optimiser, seed=0,
        augmentation=dict(augmentation="crop_flip", mean=(120.0,) * 3, std=(60.0,) * 3),
    )  # fmt: skip
    return init_state(recipe, np.zeros((8, 32, 32, 3), np.uint8))


def measure_checkpoints(every_s: float) -> None:
    """Prints what a save and a verified read take."""
    state = jax.device_get(resnet20_state())
    size = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(state)) / 1e6
    held, whole, processor, read = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(checkpoint.Checkpoints(Path(folder))) as checkpoints:
            for step in range(1, REPEATS + 2):
                began, used = time.perf_counter(), time.process_time()
                checkpoints.save(state.replace(step=np.int32(step)), 0.1)
                held.append(time.perf_counter() - began)
                checkpoints.wait()
                whole.append(time.perf_counter() - began)
                processor.append(time.process_time() - used)
        for _ in range(REPEATS):
            began = time.perf_counter()
            with contextlib.closing(checkpoint.Checkpoints(Path(folder))) as checkpoints:
                checkpoints.newest()
            read.append(time.perf_counter() - began)
    ms = [1000 * statistics.median(values[1:]) for values in (held, whole, processor, read)]
    print(f"ResNet-20 with its teacher: {size:.2f} MB; medians of {REPEATS}")
    print(f"a save holds the training up for {ms[0]:.0f} ms, is on disk after {ms[1]:.0f} ms")
    share = ms[1] / 1000 / every_s
    print(f"  and takes {ms[2]:.0f} ms of processor; every {every_s:g} s, at most {share:.2%}")
    print(f"reading and verifying it: {ms[3]:.0f} ms")
    block = np.random.default_rng(0).random(2**25, np.float32)
    began = time.perf_counter()
    store.checksum(block)
    print(f"checksums: {block.nbytes / 1e6 / (time.perf_counter() - began):,.0f} MB/s")


def measure_starts(command: list[str]) -> None:
    """Prints the seconds from the start of the program to its first step."""

    def first_step(run_dir: Path, cache: Path) -> float:
        more = [f"--workdir={run_dir}", f"--config.compilation_cache_dir={cache}"]
        began = time.perf_counter()
        process = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, text=True)
        seconds = None
        for line in process.stdout:
            if line.startswith("step ") and seconds is None:
                seconds = time.perf_counter() - began
                process.terminate()  # which saves
        if process.wait() not in (0, 143):
            raise SystemExit("the training failed")
        return seconds

    print(f"seconds to the first step, medians of 3: {' '.join(command[2:])}")
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {}
        for number in range(3):
            run, again = Path(folder) / f"run{number}", Path(folder) / f"again{number}"
            cache, fresh = Path(folder) / f"cache{number}", Path(folder) / f"fresh{number}"
            for text, arguments in (
                ("start, cold cache", (run, cache)),
                ("start, warm cache", (again, cache)),
                ("resume, warm cache", (run, cache)),
                ("resume, cold cache", (again, fresh)),
            ):
                seconds.setdefault(text, []).append(first_step(*arguments))
        for text, values in seconds.items():
            print(f"  {text}: {statistics.median(values):.1f}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="", help="of prepared TFDS data sets")
    given = parser.parse_args()
    measure_checkpoints(config.base().checkpoint_every_s)
    name = "resnet20" if given.data_dir else "quickstart"
    command = [sys.executable, "-m", "pkkd_jax.main", f"--config={CONFIGS / name}.py"]
    if given.data_dir:
        command += ["--config.batch_size=128", f"--config.data.data_dir={given.data_dir}"]
    measure_starts(command)


if __name__ == "__main__":
    main()
