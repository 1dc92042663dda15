"""How well the gradient that a run's adder filters learn by agrees with the true one.

python -m experiments.gradients RUN_DIR... [--batches=8] [--step=last] [--data_dir=DIR]

Adder layers learn by surrogates, see `pkkd_jax.ops.adder.adder_conv`. The true gradient of a filter
has sign(x - w) in the place of x - w: "filters" is the cosine between the two where layers above
hand down the same surrogate, "everywhere" where the inputs' gradients are the true ones too. Both
are of the cross-entropy alone and of all losses together, over the same augmented batches.
"""

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax import lax
from ml_collections import ConfigDict

from pkkd_jax import checkpoint, devices, diagnosis, experiment, runs
from pkkd_jax.names import UserError
from pkkd_jax.ops.adder import adder_conv
from pkkd_jax.recipe import hyperparameters


class TrueFilters(linen.Module):
    """An adder layer of the package's models whose filters have their true gradient."""

    features: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int]
    padding: int
    use_bias: bool = False
    dtype: Any = None
    everywhere = False  # whether its input has, too

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, height, width, c_in]` to `[batch, height', width', features]`."""
        shape = (*self.kernel_size, x.shape[-1], self.features)
        filters = self.param("filters", linen.initializers.normal(1.0), shape)
        true = self.distances(x if self.everywhere else lax.stop_gradient(x), filters)
        if self.everywhere:
            return true
        surrogate = adder_conv(
            x, lax.stop_gradient(filters), strides=self.strides, padding=self.padding
        )
        return surrogate + true - lax.stop_gradient(true)

    def distances(self, x: jax.Array, filters: jax.Array) -> jax.Array:
        """`-sum |patch - filter|`, differentiated by JAX, a filter at a time."""
        patches = lax.conv_general_dilated_patches(
            x,
            self.kernel_size,
            self.strides,
            [(self.padding, self.padding)] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        rows = filters.transpose(3, 2, 0, 1).reshape(self.features, -1)
        one = jax.checkpoint(lambda row: -jnp.abs(patches - row).sum(-1))
        return jnp.moveaxis(lax.map(one, rows), 0, -1)


class TrueLayer(TrueFilters):
    """The same whose input has its true gradient, too."""

    everywhere = True


def cosines(
    run_dir: str | Path,
    *,
    batches: int = 8,
    step: str | int = "last",
    data_dir: str = "",
    trust: bool = False,
) -> dict[str, dict[str, float]]:
    """Cosines of a run's surrogate gradients with the true ones.

    Args:
      run_dir: of a training whose student has adder layers.
      batches: of the training's own, over which each gradient is averaged.
      step: "last", "best" or a saved step.
      data_dir: where the data set's files are; the run's own place if "".
      trust: whether what the run names from outside the package is imported.
    Returns:
      Layer -> {"ce, filters", "ce, everywhere", "all, filters", "all, everywhere"} -> cosine.
    Raises:
      UserError: if there is no such run or step, or its student does not add.
    """
    config = runs.read_config(run_dir)
    conv = config["student"].get("conv")
    if conv != "adder":
        raise UserError(
            f"the student in {str(run_dir)!r} has {conv=}: choose a run of an adder network"
        )
    if not trust:
        parts = ("student", "teacher", "data", "distill", "optim")
        runs.refuse_outside(run_dir, config, parts, "--trust imports it")
    if data_dir:
        config["data"]["data_dir"] = data_dir
    built = experiment.build(ConfigDict(config))
    state = devices.replicate(checkpoint.load_state(run_dir, built.initial_state(), step))
    layers = {"surrogate": "adder"} | {
        name: f"{__package__}.gradients.{layer.__name__}"
        for name, layer in (("filters", TrueFilters), ("everywhere", TrueLayer))
    }
    found: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    for name, conv in layers.items():
        recipe = dataclasses.replace(built.recipe, student=built.recipe.student.clone(conv=conv))
        mapped = devices.pmap(diagnosis.student_gradients(recipe), hyperparameters(recipe))
        every = []
        first = int(state.step)
        for batch in built.splits.train_batches(first, first + batches):
            every.append(jax.device_get(mapped(state, batch)))
        total = jax.tree.map(lambda *each: sum(each), *every)
        found[name, "ce"] = total["ce"]
        found[name, "all"] = jax.tree.map(lambda *each: sum(each), *total.values())
    return {
        layer: {
            f"{loss}, {true}": _cosine(found["surrogate", loss][layer], found[true, loss][layer])
            for loss in ("ce", "all")
            for true in ("filters", "everywhere")
        }
        for layer in found["surrogate", "ce"]
    }


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.vdot(a, b) / np.sqrt(np.vdot(a, a) * np.vdot(b, b)))


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser("python -m experiments.gradients")
    parser.add_argument("run_dirs", nargs="+", metavar="RUN_DIR")
    parser.add_argument("--batches", type=int, default=8, help="over which gradients are averaged")
    parser.add_argument("--step", default="last", help="last, best, or a saved step")
    parser.add_argument("--data_dir", default="", help="where the data set's files are")
    parser.add_argument("--trust", action="store_true", help="import what the run names of others")
    given = parser.parse_args(argv)
    try:
        if given.batches < 1:
            raise UserError(f"--batches={given.batches}: it must be 1 or more")
        for run_dir in given.run_dirs:
            found = cosines(
                run_dir,
                batches=given.batches,
                step=given.step,
                data_dir=given.data_dir,
                trust=given.trust,
            )
            names = list(next(iter(found.values())))
            mean = {name: statistics.mean(each[name] for each in found.values()) for name in names}
            print(f"{run_dir}\n\n| layer | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
            for layer, each in [*found.items(), ("mean", mean)]:
                print(f"| {layer} | {' | '.join(f'{each[name]:.3f}' for name in names)} |")
            print()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
