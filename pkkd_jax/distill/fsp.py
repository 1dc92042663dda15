"""Flow of the solution procedure: how features change from layer to layer."""

import re

import jax
import jax.numpy as jnp

from pkkd_jax.distill import Distiller
from pkkd_jax.distill.taps import pair_taps, select_taps
from pkkd_jax.names import UserError

__all__ = ["fsp"]


def flow(first: jax.Array, last: jax.Array) -> jax.Array:
    """`[batch, c_first, c_last]`: inner products over places, divided by their number."""
    first, last = first.astype(jnp.float32), last.astype(jnp.float32)
    places = first.shape[1] * first.shape[2]
    return jnp.einsum("nhwa,nhwb->nab", first, last) / places


def fsp(flows: str = "stages") -> Distiller:
    """Squared difference of the matrices that say how features flow between two layers.

        loss = mean over flows and examples of ||G_T - G_S||_F^2,
        G = 1/(height * width) sum over places of first_a * last_b

    The paper trains with this loss first and with labels after; here both act together.

    Args:
      flows: "stages", from the output of each stage's first block to that of its last; or
        "first>last" tap names with commas between, of one height and width.
    Returns:
      A `Distiller` without parameters; its metric is `loss_fsp`.
    Raises:
      UserError: when applied, for taps that are not there or whose shapes differ.
    References:
      Yim et al., A Gift from Knowledge Distillation, CVPR 2017, Eqs. 1-2.
    """

    def ends(features) -> list[tuple[str, str]]:
        if flows != "stages":
            found = [tuple(tap.strip() for tap in flow.split(">")) for flow in flows.split(",")]
            if any(len(flow) != 2 for flow in found):
                raise UserError(f"{flows=} of loss 'fsp': expected FIRST>LAST with commas between")
            return found
        stages: dict[str, list[str]] = {}
        for tap in select_taps(features, "block_outputs"):
            stages.setdefault(re.match(r"(stage\d+)?", tap).group(), []).append(tap)
        if "" in stages or any(len(blocks) < 2 for blocks in stages.values()):
            raise UserError(
                "loss 'fsp' with flows=stages needs two blocks or more in each stage: choose a"
                " deeper network, or name flows=FIRST>LAST with commas between"
            )
        return [(blocks[0], blocks[-1]) for blocks in stages.values()]

    def apply(params, student, teacher, axis_name):
        del params, axis_name
        of_student, of_teacher = ends(student.features), ends(teacher.features)
        if len(of_student) != len(of_teacher):
            raise UserError(
                f"loss 'fsp' with flows=stages: {len(of_student)} stages of the student and"
                f" {len(of_teacher)} of the teacher; choose networks with as many"
            )
        losses = []
        for (a, b), (c, d) in zip(of_student, of_teacher, strict=True):
            first, last = pair_taps("fsp", student, teacher, f"{a}:{c},{b}:{d}", same="channels")
            for side in (first.student, last.student), (first.teacher, last.teacher):
                if side[0].shape[:3] != side[1].shape[:3]:
                    raise UserError(
                        f"loss 'fsp' from {first.name} to {last.name}: {list(side[0].shape)} and"
                        f" {list(side[1].shape)} differ in height or width; choose layers of one"
                        " stage"
                    )
            difference = flow(first.teacher, last.teacher) - flow(first.student, last.student)
            losses.append(jnp.square(difference).sum((1, 2)).mean())
        loss = jnp.stack(losses).mean()
        return loss, {"loss_fsp": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
