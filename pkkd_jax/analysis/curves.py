"""Learning curves of a run."""

from pathlib import Path

from pkkd_jax import metrics

COLOURS = {"student": "#0072B2", "teacher": "#D55E00"}  # Okabe and Ito: safe for colour-blind eyes


def save(run_dir: str | Path) -> Path:
    """Draws `curves.png` in a run directory: cross-entropy and accuracy by step, seen and unseen.

    Args:
      run_dir: holds `metrics.jsonl`.
    Returns:
      The path of the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = metrics.read(Path(run_dir))
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    for network, colour in COLOURS.items():
        for axes, what in ((loss, "loss"), (accuracy, "accuracy")):
            for split, style in (("train", "-"), ("test", "o--"), ("validation", "o--")):
                name = f"{split}/{network}/{what}"
                if name == "train/student/loss":
                    name += "_ce"  # comparable with the other three: without the distillation
                points = [(row["step"], row[name]) for row in rows if name in row]
                if points:
                    axes.plot(
                        *zip(*points, strict=True),
                        style,
                        color=colour,
                        markersize=4,
                        label=f"{network}, {split}",
                    )
    loss.set_yscale("log")
    for axes, label in ((loss, "cross-entropy (nats)"), (accuracy, "accuracy (fraction)")):
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    path = Path(run_dir) / "curves.png"
    figure.savefig(path, dpi=120)
    return path
