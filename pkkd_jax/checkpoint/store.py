"""The checkpoints of one run: Orbax, with checksums and the way back to the newest intact one."""

import contextlib
import errno
import json
import os
import shutil
import warnings
import zlib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization, traverse_util

from pkkd_jax.names import UserError
from pkkd_jax.state import DistillState

PARTS = ("student", "teacher", "distiller")
RECORD = "record"  # of a checkpoint: its accuracy, and the CRC-32 of every array by part
KEEP_LATEST = 2
# Errors of the disk or of permissions, that a user can mend.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
# Errors of the system, which say nothing of what was saved.
NOT_DAMAGE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE)
SPARE_BYTES = 2**20  # for a checkpoint's metadata

Flat = dict[str, np.ndarray]


class Damaged(ValueError):
    """A checkpoint that is not what was saved; the message says why."""


def _flatten(tree) -> Flat:
    """A tree as `{"params/stem/kernel": array}`, in copies that no donated buffer can reach."""
    flat = traverse_util.flatten_dict(serialization.to_state_dict(tree), sep="/")
    return {key: np.array(value) for key, value in flat.items()}


class _Keep:
    """Orbax's retention: the latest checkpoints, and the best or all of those with an accuracy."""

    def __init__(self, accuracies: dict[int, float], evaluated: bool):
        self.accuracies, self.evaluated = accuracies, evaluated

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        del context
        steps = [each.step for each in checkpoints]
        kept = self.accuracies if self.evaluated else {_best(self.accuracies, steps)}
        return [step in kept or step in sorted(steps)[-KEEP_LATEST:] for step in steps]


def _best(accuracies: dict[int, float], steps: list[int]) -> int | None:
    return max((s for s in steps if s in accuracies), key=lambda s: accuracies[s], default=None)


class Checkpoints:
    """The checkpoints of one run: the latest two, and the one of the best accuracy unseen.

    Of several processes that train together only the first has one: it reads and writes for all.

    Args:
      run_dir: the run directory.
      read_only: whether nothing is made, moved or deleted there.
      keep_evaluated: whether every checkpoint with an accuracy is kept, and not the best alone.
    """

    def __init__(self, run_dir: Path, read_only: bool = False, keep_evaluated: bool = False):
        self._run_dir = Path(run_dir).absolute()
        self._accuracies: dict[int, float] = {}
        # Orbax would write accuracies into files of its own, which it could not read when damaged.
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(), active_processes={jax.process_index()}
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Keep(self._accuracies, keep_evaluated),
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            create=False,
            save_root_metadata=False,
            enable_async_checkpointing=True,
            # Else threads would wait minutes for directories that cannot be made.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            multiprocessing_options=alone,
        )
        directory = self._run_dir / "checkpoints"
        if not read_only:
            directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(directory, options=options)
        for step in self.steps():
            with contextlib.suppress(Damaged):
                self._note(step, self._record(step)["accuracy"])

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, intact or not, oldest first."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step of the best accuracy, None if none was measured."""
        return _best(self._accuracies, self.steps())

    def save(self, state: DistillState, accuracy: float | None = None) -> None:
        """Saves `state`; `accuracy` is the student's on images unseen, if it was measured.

        Raises:
          OSError: if it cannot be written, or the one before could not.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            if accuracy is not None:  # a signal had cut off the evaluation
                self._amend(step, accuracy)
            return
        parts = {name: _flatten(getattr(state, name)) for name in PARTS if getattr(state, name)}
        parts = {name: part for name, part in parts.items() if part}
        self.wait()
        size = sum(value.nbytes for part in parts.values() for value in part.values())
        directory = str(self._manager.directory)
        if shutil.disk_usage(directory).free < size + SPARE_BYTES:
            # Found out while writing, it would leave a broken checkpoint.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), directory)
        sums = {name: {k: checksum(v) for k, v in part.items()} for name, part in parts.items()}
        items = {name: ocp.args.StandardSave(part) for name, part in parts.items()}
        items[RECORD] = ocp.args.JsonSave(_signed({"accuracy": accuracy, "crc32": sums}))
        self._note(step, accuracy)
        with _disk_errors():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def newest(self) -> tuple[int, dict[str, Flat]] | None:
        """The newest intact checkpoint, as its step and parts; None if nothing was saved.

        Damaged ones that are newer are moved to `damaged/` in the run directory, with a warning:
        left where they are, they would keep Orbax from saving their steps again.

        Raises:
          UserError: if there are checkpoints, and none is intact; they stay where they are.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                parts = self.read(step)
            except Damaged as error:
                damaged[step] = str(error)
                continue
            for each, reason in damaged.items():
                warnings.warn(
                    f"the checkpoint of step {each} is damaged ({reason}); it is moved to"
                    f" {str(self._set_aside(each))!r} and the one before is used",
                    stacklevel=2,
                )
            return step, parts
        if damaged:
            step, reason = next(iter(damaged.items()))
            raise UserError(
                f"no checkpoint in {str(self._run_dir)!r} is intact (step {step}: {reason}): see"
                " whether its files can be read, or start anew in another --workdir"
            )
        return None

    def read(self, step: int) -> dict[str, Flat]:
        """The parts of the checkpoint at `step`, flat and verified; `{}` for one that it lacks.

        Raises:
          Damaged: if it cannot be read, or an array is not what was saved.
        """
        sums = self._record(step)["crc32"]
        return {name: self._part(step, name, sums.get(name, {})) for name in PARTS}

    def _part(self, step: int, name: str, sums: dict[str, int]) -> Flat:
        if not sums:
            return {}
        flat = dict(self._restore(step, name, ocp.args.StandardRestore()))
        if flat.keys() != sums.keys():
            raise Damaged(f"{name} lacks {sorted(flat.keys() ^ sums.keys())[0]}")
        for key, value in flat.items():
            if checksum(value) != sums[key]:
                raise Damaged(f"checksum of {name}'s {key} differs")
        return flat

    def _record(self, step: int) -> dict:
        record = self._restore(step, RECORD, ocp.args.JsonRestore())
        if not isinstance(record, dict) or record.pop("own_crc32", 0) != _checksum_of_json(record):
            raise Damaged(f"checksum of its {RECORD} differs")
        return record

    def _note(self, step: int, accuracy: float | None) -> None:
        if accuracy is not None:
            self._accuracies[step] = accuracy

    def _amend(self, step: int, accuracy: float) -> None:
        self.wait()
        record = {**self._record(step), "accuracy": accuracy}
        file = Path(self._manager.directory) / str(step) / RECORD / "metadata"  # Orbax's name
        whole = file.with_name("amended")
        whole.write_text(json.dumps(_signed(record)))
        whole.replace(file)
        self._note(step, accuracy)

    def _restore(self, step: int, item: str, arguments):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: arguments}))[item]
        except MemoryError:
            raise
        except Exception as error:  # of many kinds, whatever is broken
            if isinstance(error, OSError) and error.errno in NOT_DAMAGE:
                raise
            text = " ".join(str(error).split()) or "no message"
            raise Damaged(f"{item}: {type(error).__name__}: {text[:200]}") from error

    def _set_aside(self, step: int) -> Path:
        aside = self._run_dir / "damaged"
        aside.mkdir(exist_ok=True)
        place = aside / str(step)
        while place.exists():
            place = place.with_name(f"{place.name}+")
        (self._run_dir / "checkpoints" / str(step)).rename(place)
        self._manager.reload()
        return place

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
          OSError: if there is no space for it.
        """
        with _disk_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits likewise, and frees the threads."""
        try:
            self.wait()
        finally:
            with contextlib.suppress(Exception):  # what the wait has raised already
                self._manager.close()


def checksum(array: np.ndarray) -> int:
    """CRC-32 of the bytes of `array`."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def _checksum_of_json(tree: dict) -> int:
    return zlib.crc32(json.dumps(tree, sort_keys=True).encode())


def _signed(record: dict) -> dict:
    return {**record, "own_crc32": _checksum_of_json(record)}


@contextlib.contextmanager
def _disk_errors():
    """Makes an OSError of what the library below Orbax says of the disk in a ValueError."""
    try:
        yield
    except ValueError as error:
        found = [number for number in DISK_ERRORS if os.strerror(number) in str(error)]
        if "RESOURCE_EXHAUSTED" in str(error):
            found.append(errno.ENOSPC)
        if not found:
            raise
        raise OSError(found[0], os.strerror(found[0])) from error
