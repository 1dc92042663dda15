"""What a configuration may not ask for, found before anything is built."""

import math

import jax
from flax import traverse_util

from pkkd_jax.names import UserError, unknown

CHOICES = {
    "teacher.mode": ("progressive", "fixed", "snapshot", "none"),
    "teacher.which": ("student", "teacher"),
}
# Leaf to whether a value is allowed, and what is.
NUMBERS = {
    "max_damaged": (lambda v: v >= 0, "0 (none) or more"),
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "batch_size": (lambda v: v >= 1, "1 or more, for example 256"),
    "accumulate_steps": (lambda v: v >= 1, "1 or more"),
    "steps": (lambda v: v >= 0, "0 (as many as config.epochs makes) or more"),
    "workers": (lambda v: v >= 0, "0 (threads) or more"),
    "alpha": (lambda v: v >= 0, "0 (no labels) or more"),
    "label_smoothing": (lambda v: 0 <= v < 1, "from 0 to below 1"),
    "optim.cycles": (lambda v: v >= 1, "1 or more"),
    "optim.weight_decay": (lambda v: v >= 0, "0 (none) or more"),
    "optim.adder_eta": (lambda v: v > 0, "above 0"),
    "optim.warmup_steps": (lambda v: v >= 0, "0 (no warm-up) or more"),
    "eval.every_epochs": (lambda v: v > 0, "above 0"),
    "eval.recalibrate_batches": (lambda v: v >= 0, "0 (off) or more"),
    "eval.pictures": (lambda v: v >= 0, "0 (none) or so many evaluations"),
    "checkpoint_every_s": (lambda v: v >= 0, "0 (after every step) or more"),
    "skip_not_finite": (lambda v: v >= 0, "0 (stop at the first) or more"),
    "watchdog_s": (lambda v: v >= 0, "0 (off) or more"),
    "log_every_steps": (lambda v: v >= 1, "1 or more"),
}


def check(config: dict) -> None:
    """Refuses leaves of `config`, plain JSON types, that are out of range or contradict others.

    Raises:
      UserError: naming the leaf, its value, and what is allowed.
    """
    leaves = traverse_util.flatten_dict(config, sep=".")
    for path, value in leaves.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{path}={value}: it must be finite")
    for path, allowed in CHOICES.items():
        if leaves[path] not in allowed:
            raise unknown(f"config.{path}", leaves[path], allowed)
    for path, (is_allowed, allowed) in NUMBERS.items():
        if not is_allowed(leaves[path]):
            raise UserError(f"config.{path}={leaves[path]}: it must be {allowed}")
    if config["teacher"]["mode"] == "snapshot" and config["optim"]["cycles"] < 2:
        raise UserError(
            "config.teacher.mode='snapshot' with config.optim.cycles=1: the teacher is the student"
            " at the end of the cycle before; set config.optim.cycles to 2 or more"
        )
    if config["steps"] == 0 and not config["epochs"] > 0:
        raise UserError(
            f"config.steps=0 and config.epochs={config['epochs']}: one of them must be positive"
        )
    run_dir, mode = config["teacher"]["run_dir"], config["teacher"]["mode"]
    if run_dir and mode != "fixed":
        raise UserError(
            f"config.teacher.run_dir={run_dir!r} with config.teacher.mode={mode!r}, which has no"
            " use for it: set config.teacher.mode to 'fixed', or leave the directory out"
        )
    devices, batch_size = jax.device_count(), config["batch_size"]
    parts = devices * config["accumulate_steps"]
    if batch_size % parts:
        raise UserError(
            f"config.batch_size={batch_size} does not divide among {devices} devices and"
            f" {config['accumulate_steps']} micro-batches: choose a multiple of {parts}"
        )
