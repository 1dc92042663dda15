"""TensorBoard's histograms and pictures of a training under way."""

import logging
from pathlib import Path

import numpy as np

from pkkd_jax.analysis import plots
from pkkd_jax.analysis.run import Run, responses
from pkkd_jax.analysis.similarity import cka, embedding
from pkkd_jax.analysis.weights import filters

logging.getLogger("tensorboardX").setLevel(logging.ERROR)


def write(run_dir: str | Path, run: Run, images: np.ndarray, labels: np.ndarray) -> None:
    """Adds histograms of filters and responses, and pictures, under the step of `run`.

    Args:
      run_dir: the run directory, whose `tensorboard` they go to.
      run: the training as it stands.
      images: float32 `[n, height, width, channels]`, normalised.
      labels: int `[n]`.
    """
    from tensorboardX import SummaryWriter

    weights = {which: filters(network) for which, network in run.networks.items()}
    stages = responses(run, images)
    with SummaryWriter(str(Path(run_dir) / "tensorboard")) as writer:

        def histograms(name, arrays):
            for key, values in arrays.items():
                writer.add_histogram(f"{name}/{key}", values.ravel(), run.step)

        def picture(name, figure):
            writer.add_figure(name, figure, run.step, close=False)

        for which in run.networks:
            histograms(f"filters/{which}", weights[which])
            for stage, sides in stages.items():
                histograms(f"{stage}/{which}", sides[which])
        features = {which: net.outputs(images).features for which, net in run.networks.items()}
        points = {w: embedding(f["penultimate"]) for w, f in features.items() if "penultimate" in f}
        if points:
            picture("penultimate", plots.class_scatter(points, labels))
        picture("filters", plots.filter_histograms(weights))
        for stage, sides in stages.items():
            if len(sides) == 2:
                taps = list(sides["student"])
                matrix = cka(sides["student"], sides["teacher"])
                picture(f"cka/{stage}", plots.cka_heatmaps({stage: matrix}, taps, taps))
