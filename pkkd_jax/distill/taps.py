"""Which features of teacher and student a loss compares."""

import re
from typing import NamedTuple

from jax import Array

from pkkd_jax.names import UserError, unknown

# What each keyword selects: the last tap that matches, for every value of the group.
LAST = {
    "block_ends": r"(.*)\.conv\d+$",
    "stage_ends": r"(stage\d+)\..*\.conv\d+$",
    "block_outputs": r"(?!stem)(.*)\.out$",
    "stage_outputs": r"(stage\d+)\..*\.out$",
}


class Pair(NamedTuple):
    """Features to compare: the student's name for them, and both networks' values."""

    name: str
    student: Array
    teacher: Array


def select_taps(features, taps: str) -> list[str]:
    """Names of the taps that `taps` stands for, in forward order; stem and penultimate never.

    Args:
      features: mapping whose keys are tap names.
      taps: "all", every convolution; "block_ends", the last one of each block; "stage_ends", of
        each stage; "block_outputs" and "stage_outputs", what blocks and stages hand on, behind
        BatchNorm, sum and ReLU (a network without stages or blocks: every layer's); or names with
        commas between.
    Raises:
      UserError: for a name that is no tap; the message has the nearest right one.
    """
    outputs = [tap for tap in features if tap.endswith(".out") and tap != "stem.out"]
    responses = [t for t in features if not t.endswith(".out") and t not in ("stem", "penultimate")]
    if taps == "all":
        return responses
    if taps in LAST:
        last = {}
        for tap in features:
            match = re.match(LAST[taps], tap)
            if match:
                last[match.group(1)] = tap
        return list(last.values()) or (outputs if taps.endswith("outputs") else responses)
    chosen = [tap.strip() for tap in taps.split(",")]
    for tap in chosen:
        if tap in ("auto", "all", *LAST):
            raise UserError(f"{taps=}: {tap!r} stands alone; name all taps, or use it alone")
        if tap not in features:
            raise unknown("tap", tap, {*features, "auto", "all", *LAST})
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{taps=}: a tap stands there twice; name each once")
    return chosen


def pair_taps(loss: str, student, teacher, taps: str, same: str = "") -> list[Pair]:
    """Pairs the student's taps with the teacher's.

    Args:
      loss: name of the loss, for messages.
      student: `Outputs` of the student.
      teacher: of the teacher, which may have another architecture.
      taps: what `select_taps` takes, applied to each network, their taps paired in forward order;
        "auto", block ends where both networks have the same, else stage ends; or pairs
        "student's:teacher's" with commas between.
      same: what each pair must have in common: "size" (height and width), "channels", or nothing
        but the examples.
    Raises:
      UserError: for taps that are not there, do not pair up, or do not fit together.
    """
    if taps == "auto":
        ends = [select_taps(outputs.features, "block_ends") for outputs in (student, teacher)]
        taps = "block_ends" if ends[0] == ends[1] else "stage_ends"
    if ":" in taps:
        words = [word.partition(":") for word in taps.split(",")]
        sides = [",".join(a for a, _, _ in words), ",".join(b or a for a, _, b in words)]
    else:
        sides = [taps, taps]
    of_student = select_taps(student.features, sides[0])
    of_teacher = select_taps(teacher.features, sides[1])
    advice = "name pairs, taps=STUDENT:TEACHER with commas between, or choose networks that match"
    if len(of_student) != len(of_teacher) or not of_student:
        raise UserError(
            f"loss {loss!r}: taps={taps} are {len(of_student)} of the student"
            f" ({', '.join(of_student)}) and {len(of_teacher)} of the teacher"
            f" ({', '.join(of_teacher)}); {advice}"
        )
    pairs = []
    for a, b in zip(of_student, of_teacher, strict=True):
        pair = Pair(a, student.features[a], teacher.features[b])
        compared = {"": slice(1), "size": slice(3), "channels": slice(3, 4)}[same]
        shapes = pair.student.shape, pair.teacher.shape
        if shapes[0][compared] != shapes[1][compared] or (same and len(shapes[0]) != 4):
            raise UserError(
                f"loss {loss!r}: the student's {a} is {list(shapes[0])}, the teacher's {b}"
                f" {list(shapes[1])}, and both must be [batch, height, width, channels] of"
                f" {'one size' if same == 'size' else 'as many channels'}; {advice}"
            )
        pairs.append(pair)
    return pairs
