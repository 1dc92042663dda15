"""The steps of a training: update, log, evaluate, save, until all are done or a signal comes."""

import collections
import time
import warnings
from collections.abc import Callable

import jax
import numpy as np

from pkkd_jax import checkpoint, devices, diagnosis, distributed, evaluation, metrics, stopping
from pkkd_jax.experiment import Experiment
from pkkd_jax.names import UserError
from pkkd_jax.recipe import hyperparameters
from pkkd_jax.state import DistillState
from pkkd_jax.update import joint_update


class Loop:
    """A training from `state` on; `run` makes all of its steps.

    Args:
      built: what is trained.
      state: as NumPy arrays, the same in all processes.
      checkpoints, writer: of the first process, which alone writes; None in the others.
      watchdog: hears of every step.
      at_interval, at_signal, at_picture: as `train.train_and_evaluate` has them.
    """

    def __init__(
        self,
        built: Experiment,
        state: DistillState,
        checkpoints: checkpoint.Checkpoints | None,
        writer: metrics.Writer | None,
        watchdog: stopping.Watchdog,
        at_interval: Callable[[dict], None],
        at_signal: Callable[[str], None],
        at_picture: Callable[[Experiment, DistillState], None],
    ):
        self.built, self.config = built, built.config
        self.checkpoints, self.writer, self.watchdog = checkpoints, writer, watchdog
        self.at_interval, self.at_signal, self.at_picture = at_interval, at_signal, at_picture
        self.step = int(state.step)
        self.last = writer.last if writer else {}
        self.judged = f"{built.splits.judge}/student/accuracy"
        self.began = time.perf_counter() - self.last.get("wall_s", 0.0)
        self.saved_at = time.perf_counter()
        self.since: tuple[int, float] | None = None  # step and time that the rate counts from
        self.figures: dict = {}  # the latest of all
        self.pending: list = []  # of steps that are not logged yet
        # Steps in flight while the host goes on: few, so that a signal is obeyed soon; none on CPU,
        # where a step that waits slows the one that runs, and collectives of many devices may hang.
        self.ahead = 0 if jax.default_backend() == "cpu" else 2
        self.unchecked: collections.deque = collections.deque()  # that may be in flight: figures
        self.skipped = 0
        self.state, self.given = devices.replicate(state), hyperparameters(built.recipe)
        self.update = devices.pmap(joint_update(built.recipe), self.given, donate=True)
        self.mapped: dict = {}  # functions of evaluations, which compile once
        self.agreement = stopping.Agreement(self.ahead)
        self.received: list[int] = []  # signals

    def run(self) -> dict:
        """Makes the steps that are missing.

        Returns:
          The figures of the last evaluation, "steps", and "wall_s" of all of the training.
        Raises:
          UserError: for updates that are not finite.
          Interrupted: if a signal arrived, in any process; the state has been saved.
        """
        built, total, results = self.built, self.built.total_steps, {}
        first, every = self.step + 1, self.config["log_every_steps"]
        with stopping.signals(self.at_signal) as self.received:
            missing = self.step in built.eval_steps and self.judged not in self.last
            if distributed.from_first(np.int32(missing)):
                results = self.evaluate_and_save()  # a signal had cut it off
            for batch in self._batches(self.step, total):
                self.state, row = self.update(self.state, batch)
                self.pending.append(row)
                self.step += 1
                self.unchecked.append((self.step, row))
                self.check(self.ahead)
                wish, evaluates = self.wish(), self.step in built.eval_steps
                if evaluates or wish or self.step == first or self.step % every == 0:
                    self.log()
                    wish = max(wish, self.wish())
                self.obey(wish)
                if evaluates:
                    results = self.evaluate_and_save()
                elif wish:
                    self.save()
            results = results or self.evaluate()
        return {**results, "steps": total, "wall_s": time.perf_counter() - self.began}

    def _batches(self, start: int, stop: int):
        return self.built.splits.train_batches(start, stop, self.config["accumulate_steps"])

    def _write(self, row: dict) -> None:
        if self.writer:
            self.writer.write(self.step, {**row, "wall_s": time.perf_counter() - self.began})

    def _show(self, more: dict) -> None:
        if self.writer:
            steps = {"step": self.step, "total_steps": self.built.total_steps}
            self.at_interval({**self.figures, **steps, **more})

    def check(self, in_flight: int = 0) -> None:
        """Waits for all steps but so many, and sees whether their updates were finite."""
        while len(self.unchecked) > in_flight:
            step, row = self.unchecked.popleft()
            if not jax.device_get(row["finite"]):
                self.skipped += 1
                self._not_finite(step)

    def _not_finite(self, step: int) -> None:
        state = self.state.replace(step=np.int32(step - 1))
        what = diagnosis.first_not_finite(
            self.built.recipe, state, next(self._batches(step - 1, step))
        )
        limit, text = self.config["skip_not_finite"], f"step {step}: {what} not finite"
        if step != self.step:
            text += f" (looked for with the parameters of step {self.step})"
        if self.skipped <= limit:
            text += f"; update {self.skipped} of at most {limit} left out"
            warnings.warn(text, stacklevel=2)
            return
        steps = self.checkpoints.steps() if self.checkpoints else []
        kept = f"the checkpoint of step {steps[-1]} is kept" if steps else "no checkpoint yet"
        raise UserError(
            f"{text}; {kept}; lower config.optim.learning_rate or a weight in config.distill and"
            " start in another --workdir, or leave out such updates by config.skip_not_finite (now"
            f" {limit})"
        )

    def log(self) -> None:
        """Means of the steps since the last time."""
        self.check()
        if not self.pending:
            return
        rows = jax.device_get(self.pending)
        self.pending.clear()
        rows = [row for row in rows if row.pop("finite")] or rows
        row = {f"train/{key}": float(np.mean([r[key] for r in rows])) for key in rows[0]}
        if self.skipped:
            row["train/skipped_updates"] = self.skipped
        self.figures |= row
        shown = {}
        if self.since:  # not after the first step, which compiles
            step, then = self.since
            batch_size = self.config["batch_size"]
            rate = (self.step - step) * batch_size / (time.perf_counter() - then)
            row["train/images_per_s"] = shown["images_per_s"] = rate
            shown["left_s"] = (self.built.total_steps - self.step) * batch_size / rate
        self._write(row)
        self._show(shown)
        self.since = self.step, time.perf_counter()

    def evaluate(self) -> dict:
        """Figures of both networks on the images that judge them."""
        recipe = self.built.recipe
        networks = {"student": recipe.student, "teacher": recipe.teacher}
        networks = {name: model for name, model in networks.items() if model is not None}
        found = evaluation.evaluate_networks(
            networks,
            {name: getattr(self.state, name).variables for name in networks},
            self.built.splits,
            self.config["eval"]["recalibrate_batches"],
            self.mapped,
            lambda: self.obey(self.wish()),
        )
        if self.config["eval"]["gradient_shares"]:
            if "shares" not in self.mapped:
                self.mapped["shares"] = devices.pmap(diagnosis.gradient_shares(recipe), self.given)
            batch = next(self._batches(self.step, self.step + 1))
            shares = jax.device_get(self.mapped["shares"](self.state, batch))
            found |= {f"train/student/share_{key}": float(v) for key, v in shares.items()}
        self.figures |= found
        self._write(found)
        self._show({})
        self.since = self.step, time.perf_counter()
        return found

    def evaluate_and_save(self) -> dict:
        """As `evaluate`; the state is saved with its accuracy, and pictured if it is due."""
        found = self.evaluate()
        self.save(found[self.judged])
        if self.writer and self.step in self.built.picture_steps:
            self.at_picture(self.built, jax.device_get(self.state))
            self.since = self.step, time.perf_counter()
        return found

    def wish(self) -> int:
        """A signal that some process received, or 1 if it is time to save, or 0."""
        self.watchdog.alive()
        due = time.perf_counter() - self.saved_at >= self.config["checkpoint_every_s"]
        return self.agreement.largest(self.received[0] if self.received else int(due))

    def obey(self, wish: int) -> None:
        """Saves and ends the training where `wish` is a signal."""
        if wish > 1:
            self.save()
            raise stopping.Interrupted(wish, self.step)

    def save(self, accuracy: float | None = None) -> None:
        """Saves the state, with its accuracy if it has been evaluated."""
        if self.checkpoints:
            self.checkpoints.save(self.state, accuracy)
        self.saved_at = time.perf_counter()
        self.agreement.asked.clear()  # what was asked before does not ask for another
