"""Knowledge distillation from softened logits."""

import jax
import jax.numpy as jnp

from pkkd_jax.distill import Distiller
from pkkd_jax.names import UserError

__all__ = ["kd"]


def kd(temperature: float = 1.0) -> Distiller:
    """Divergence of the student's softened predictions from the teacher's.

        loss = T^2 * mean over examples of KL(softmax(teacher / T) || softmax(student / T))

    Args:
      temperature: T > 0; the factor T^2 keeps the gradient's size independent of it.
    Returns:
      A `Distiller` without parameters; its metric is `loss_kd`.
    Raises:
      UserError: if `temperature` is not positive.
    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015, section 2.
    """
    if not temperature > 0:
        raise UserError(f"{temperature=} of loss 'kd': it must be above 0, for example 4.0")

    def apply(params, student, teacher, axis_name):
        del params, axis_name
        log_student = jax.nn.log_softmax(student.logits.astype(jnp.float32) / temperature)
        log_teacher = jax.nn.log_softmax(teacher.logits.astype(jnp.float32) / temperature)
        divergence = (jnp.exp(log_teacher) * (log_teacher - log_student)).sum(-1)
        loss = temperature**2 * divergence.mean()
        return loss, {"loss_kd": loss}

    return Distiller(lambda key, student, teacher: {}, apply)
