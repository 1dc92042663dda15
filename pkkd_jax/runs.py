"""What a run directory says of itself, read without importing or executing anything it names."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from pkkd_jax import distill
from pkkd_jax.names import UserError, unknown

DTYPES = ("float32", "bfloat16")  # of a computation

# What a configuration always has, and is asked for here and by those who read one.
LEAVES = ("num_classes", "dtype", "batch_size", "seed", "workers", "max_damaged", "distill")
PARTS = {
    "student": ("name",),
    "teacher": ("name", "mode"),
    "data": ("name",),
    "optim": ("name",),
    "eval": ("recalibrate_batches",),
}


def read_config(run_dir: str | Path) -> dict:
    """The configuration that a run directory was made with.

    Raises:
      UserError: if `run_dir` holds no run.
    """
    path = Path(run_dir) / "config.json"
    if not path.is_file():
        raise UserError(
            f"run directory {str(run_dir)!r} holds no config.json: expected a directory that"
            " `python -m pkkd_jax.main --workdir=DIR` wrote"
        )
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("not the configuration of a training")
        missing = [leaf for leaf in LEAVES if leaf not in config]
        for part, leaves in PARTS.items():
            found = config.get(part)
            found = found if isinstance(found, dict) else {}
            missing += [f"{part}.{leaf}" for leaf in leaves if leaf not in found]
        if missing:
            raise ValueError(f"it lacks {missing[0]}")
        return config
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{str(path)!r} cannot be used ({error}): restore it, or choose another directory"
        ) from error


def network_arguments(config: dict, which: str) -> dict | None:
    """Keywords of `models.build` for the student or teacher of a run's `config`; None if none.

    Raises:
      UserError: if `which` is neither, or the computation's dtype is unknown.
    """
    if which not in ("student", "teacher"):
        raise UserError(f"{which=}: expected 'student' or 'teacher'")
    if which == "teacher" and config["teacher"]["mode"] == "none":
        return None
    if which == "teacher" and config["teacher"]["mode"] == "snapshot":
        which = "student"
    own = {k: v for k, v in config[which].items() if k not in ("mode", "run_dir", "which")}
    if config["dtype"] not in DTYPES:
        raise unknown("config.dtype", config["dtype"], DTYPES)
    if config["dtype"] != "float32":  # a model of the user's own need not have the field
        own["dtype"] = config["dtype"]
    return {**own, "num_classes": config["num_classes"]}


def refuse_outside(run_dir: str | Path, config: dict, parts: Iterable[str], remedy: str) -> None:
    """Refuses a run's names from outside the package: to use them would import them.

    Args:
      run_dir: for the message.
      config: what `read_config` returned.
      parts: of the configuration whose names will be resolved, such as "student" or "distill".
      remedy: what a user who trusts the run does instead.
    Raises:
      UserError: at the first dotted name.
    """
    for part in parts:
        for name in _names(config, part):
            if "." in name:
                raise UserError(
                    f"{name!r} in config.{part} of {str(run_dir)!r} is from outside the package:"
                    f" {remedy}"
                )


def _names(config: dict, part: str) -> Iterator[str]:
    """What building a part of a configuration resolves."""
    if part == "distill":
        yield from (name for name, _ in distill.named(config[part]))
        return
    networks = part in ("student", "teacher")
    arguments = network_arguments(config, part) if networks else config[part]
    yield from (str((arguments or {}).get(key, "")) for key in ("name", "conv"))
