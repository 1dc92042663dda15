"""Costs as tables, as JSON, and in one line."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pkkd_jax import metrics
from pkkd_jax.cost.figures import COLUMNS, Cost, Layer
from pkkd_jax.cost.twins import TWINS, twins

PREFIXES = {1e-12: "p", 1e-9: "n", 1e-6: "u", 1e-3: "m", 1: "", 1e3: "k", 1e6: "M", 1e9: "G"}


def short(number: float, unit: str = "") -> str:
    """Three digits and an SI prefix: `40.8 M`; whole numbers below a thousand as they are."""
    if number == int(number) < 1000:
        return f"{int(number)} {unit}".rstrip()
    # What rounds up to 1000 takes the next prefix.
    scale = max((s for s in PREFIXES if number >= 0.9995 * s), default=min(PREFIXES))
    digits = f"{number / scale:#.3g}".rstrip(".")
    return f"{digits} {PREFIXES[scale]}{unit}".rstrip()


def _joules(energy_pj: float) -> str:
    return short(energy_pj * 1e-12, "J")


def _table(layers: list[Layer], head: str, precision: str, layers_only: bool) -> list[list[str]]:
    columns = () if layers_only else COLUMNS
    rows = [[head, "mul", "add", "xnor", *columns, "params", "activations", "energy"]]
    for layer in layers:
        others = [getattr(layer, column) for column in columns]
        numbers = [layer.mul, layer.add, layer.xnor, *(o.mul + o.add for o in others)]
        numbers += [layer.params, layer.activations]
        energy = _joules(layer.energy_pj(precision, layers_only))
        rows.append([layer.name, *map(short, numbers), energy])
    return rows


def _tables(costs: Mapping[str, Cost], precision: str, layers_only: bool):
    """Title and rows of each table."""
    for name, cost in costs.items():
        layers = [*cost.layers, cost.total]
        yield _title(name), _table(layers, "layer", precision, layers_only)
    yield "Totals of one image", totals(costs, precision, layers_only)


def totals(
    costs: Mapping[str, Cost], precision: str = "float32", layers_only: bool = False
) -> list[list[str]]:
    """A table of all networks: its head, then a row for each."""
    found = _table([c.total for c in costs.values()], "network", precision, layers_only)
    for row, name in zip(found[1:], costs, strict=True):
        row[0] = _title(name)
    return found


def _title(name: str) -> str:
    return name.upper() if name in TWINS else name


def notes(
    costs: Mapping[str, Cost], precision: str = "float32", layers_only: bool = False
) -> list[str]:
    """What has to be said of a table."""
    found = [
        f"Energy in {precision}: arithmetic only, memory traffic not included; 45 nm, Horowitz,"
        " ISSCC 2014.",
        "XNOR of one bit: not in that table, an eighth of an int8 addition is taken.",
        "mul, add, xnor: of convolutions and matrix products with their biases, which give out the"
        " activations.",
    ]
    if layers_only:
        found.append("Normalisation, pooling, activation functions and sums are left out.")
    else:
        found.append(
            "norm, pool, activation, sum: operations in what follows a layer, of any kind; they are"
            " in the energy."
        )
    for name, cost in costs.items():
        if cost.not_counted:
            found.append(f"Not counted in the {_title(name)}: {', '.join(cost.not_counted)}.")
    return found


def text(costs: Mapping[str, Cost], precision: str = "float32", layers_only: bool = False) -> str:
    """Tables for a terminal: each network by layer, then the totals."""
    parts = []
    for title, rows in _tables(costs, precision, layers_only):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        parts.append("\n".join([title, *lines]))
    return "\n\n".join([*parts, "\n".join(notes(costs, precision, layers_only))])


def markdown(
    costs: Mapping[str, Cost], precision: str = "float32", layers_only: bool = False
) -> str:
    """The tables of `text` in Markdown."""
    parts = ["# Cost of one image"]
    for title, (head, *rows) in _tables(costs, precision, layers_only):
        rule = ["---", *("---:" for _ in head[1:])]
        lines = ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join([*parts, *notes(costs, precision, layers_only)]) + "\n"


def to_json(
    costs: Mapping[str, Cost], precision: str = "float32", layers_only: bool = False
) -> dict[str, dict]:
    """Costs in JSON's types: the total of each network, and under "layers" each of its layers.

    Args:
      costs: by name, as `twins` returns them.
      precision: of the energy, see `Layer.energy_pj`.
      layers_only: whether norm, pool, activation and sum are left out.
    Returns:
      name -> `{"mul", "add", "xnor", "energy_pj", "params", "activations", "norm": {"mul", "add"},
      "pool", "activation", "sum", "precision", "not_counted", "layers": [{"name", ...}]}`.
    """

    def figures(layer: Layer) -> dict:
        others = {} if layers_only else {column: vars(getattr(layer, column)) for column in COLUMNS}
        return {
            **{key: getattr(layer, key) for key in ("mul", "add", "xnor")},
            "energy_pj": layer.energy_pj(precision, layers_only),
            **{key: getattr(layer, key) for key in ("params", "activations")},
            **others,
        }

    return {
        name: {
            **figures(cost.total),
            "precision": precision,
            "not_counted": list(cost.not_counted),
            "layers": [{"name": layer.name, **figures(layer)} for layer in cost.layers],
        }
        for name, cost in costs.items()
    }


def line(costs: Mapping[str, Cost], conv: str) -> str:
    """What an image costs the network whose convolution is `conv`, and its ordinary twin."""
    name = next((twin for twin, its_conv in TWINS.items() if its_conv == conv), "student")
    own, cnn = costs[name], costs["cnn"]

    def operations(cost):
        numbers = {what: getattr(cost.total, what) for what in ("mul", "add", "xnor")}
        return ", ".join(f"{short(v)} {what}" for what, v in numbers.items() if v or what != "xnor")

    found = f"an image: {operations(own)}"
    energy = _joules(own.energy_pj())
    if own is not cnn:
        found += f" (CNN: {operations(cnn)})"
        energy += f" instead of {_joules(cnn.energy_pj())}"
    missing = f", without {', '.join(own.not_counted)}" if own.not_counted else ""
    return f"{found}, {energy} in float32{missing}"


def described(
    arguments: Mapping[str, Any], image_shape: Sequence[int]
) -> tuple[dict[str, Cost], str]:
    """`twins`, and `line` of the network itself; none and why, where they cannot be counted.

    So it can be with a twin that a user's own network has not.
    """
    try:
        found = twins(arguments, image_shape)
        return found, line(found, arguments.get("conv", "conv"))
    except Exception as error:  # of any kind, in code of the user's
        text = " ".join(str(error).split())[:200]
        return {}, f"not counted: {type(error).__name__}: {text}"


def write(run_dir: Path, costs: Mapping[str, Cost]) -> None:
    """Writes `cost.json` and `cost.md` into `run_dir`, in float32."""
    metrics.write_json(run_dir / "cost.json", to_json(costs))
    (run_dir / "cost.md").write_text(markdown(costs))
