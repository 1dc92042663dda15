"""Trainings by the command line, as several tests start them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from pkkd_jax import checkpoint

ROOT = Path(__file__).parent.parent
QUICKSTART = str(ROOT / "configs" / "quickstart.py")
SHORT = [
    "--config.steps=12",
    "--config.batch_size=16",
    "--config.checkpoint_every_s=0",
    "--config.log_every_steps=3",
    "--config.eval.recalibrate_batches=2",
]


def command(workdir, *more):
    return ["main", f"--config={QUICKSTART}", f"--workdir={workdir}", *SHORT, *more]


def start(workdir, *more):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-m", "pkkd_jax.main", *command(workdir, *more)[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def photographs(root, colour=100, count=8):
    """A folder of `count` images of each of two classes, in each split."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (8, 8), (colour, colour, 10 * i))
                image.save(root / split / name / f"{i}.png")


def final(workdir):
    """Parameters of all parts at the last step, and the test figures."""
    checkpoints = checkpoint.Checkpoints(workdir)
    step = checkpoints.steps()[-1]
    parts = checkpoints.read(step)
    checkpoints.close()
    results = json.loads((workdir / "results.json").read_text())
    return step, parts, {k: v for k, v in results.items() if k.startswith("test/")}


def assert_same_run(a, b):
    (step_a, parts_a, figures_a), (step_b, parts_b, figures_b) = final(a), final(b)
    assert (step_a, figures_a) == (step_b, figures_b)
    for name in checkpoint.PARTS:
        assert parts_a[name].keys() == parts_b[name].keys()
        for key, value in parts_a[name].items():
            np.testing.assert_array_equal(value, parts_b[name][key])


MINE = """
from flax import linen
from pkkd_jax import nn
from pkkd_jax.data.sources.digits import digits as data
from pkkd_jax.distill import Distiller


def logits(scale=1.0):
    def apply(params, student, teacher, axis_name):
        loss = scale * ((student.logits - teacher.logits) ** 2).mean()
        return loss, {"loss_logits": loss}

    return Distiller(lambda key, student, teacher: {}, apply)


class Net(linen.Module):
    num_classes: int
    conv: str = "conv"
    bn_axis_name: str | None = None
    width: int = 4

    @linen.compact
    def __call__(self, images, train):
        x = linen.Conv(self.width, (3, 3))(images)
        y = nn.convolution(self.conv)(self.width, (3, 3))(x)
        z = linen.BatchNorm(not train, axis_name=self.bn_axis_name)(y).mean((1, 2))
        return nn.Outputs(linen.Dense(self.num_classes)(z), {"stem": x, "conv1": y})
"""
