"""TensorBoard's histograms and pictures of a training under way."""

from pathlib import Path

import numpy as np

from pkkd_jax.analysis import plots
from pkkd_jax.analysis.features import penultimate, responses
from pkkd_jax.analysis.run import Run
from pkkd_jax.analysis.similarity import cka
from pkkd_jax.analysis.weights import filters, shared_layers


def write(run_dir: str | Path, run: Run, images: np.ndarray, labels: np.ndarray) -> None:
    """Adds histograms of filters and responses, and pictures, under the step of `run`.

    Args:
      run_dir: the run directory, to whose `tensorboard/pictures` they go: TensorBoard reads one
        file of a directory at a time, and the scalars' is still written.
      run: the training as it stands.
      images: float32 `[n, height, width, channels]`, normalised.
      labels: int `[n]`.
    """
    from tensorboardX import SummaryWriter

    weights = {which: filters(network) for which, network in run.networks.items()}
    stages = responses(run, images)
    folder, suffix = Path(run_dir) / "tensorboard" / "pictures", f".{run.step}"
    with SummaryWriter(str(folder), filename_suffix=suffix) as writer:

        def histograms(name, arrays):
            for key, values in arrays.items():
                writer.add_histogram(f"{name}/{key}", values.ravel(), run.step)

        def picture(name, figure):
            writer.add_figure(name, figure, run.step, close=False)

        for which in run.networks:
            histograms(f"filters/{which}", weights[which])
            for stage, sides in stages.items():
                histograms(f"{stage}/{which}", sides[which])
        points = penultimate(run, images)
        if points:
            picture("penultimate", plots.class_scatter(points, labels))
        if shared_layers(weights):
            picture("filters", plots.filter_histograms(weights))
        for stage, sides in stages.items():
            if all(sides.get(which) for which in ("student", "teacher")):
                matrix = {stage: cka(sides["student"], sides["teacher"])}
                picture(f"cka/{stage}", plots.cka_heatmaps(matrix, *map(list, sides.values())))
