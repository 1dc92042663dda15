"""Progressive kernel-based knowledge distillation: features matched in a kernel space."""

import collections
import math

import jax
import jax.numpy as jnp
from jax import lax

from pkkd_jax.distill import Distiller
from pkkd_jax.distill.taps import pair_taps
from pkkd_jax.names import UserError
from pkkd_jax.ops.conv import sum_of_products
from pkkd_jax.ops.primitive import mean_over

__all__ = ["pkkd"]

UNDERFLOW_EXAMPLES = 32  # the first of each device: an estimate needs no more


def kernel_of(z: jax.Array, log_sigma2: jax.Array, max_exponent: float) -> jax.Array:
    """`exp(z / (2 sigma^2))` in float32, the exponent within +-max_exponent.

    Of an adder's `z = -||x - f||_1` it is the Laplacian kernel of patch and filter; of `z = x * f`
    the exponential dot-product kernel, which is the Gaussian once their norms are divided out.
    """
    exponent = z.astype(jnp.float32) / (2 * jnp.exp(log_sigma2))
    return jnp.exp(jnp.clip(exponent, -max_exponent, max_exponent))


def first_sigma2(z: jax.Array) -> jax.Array:
    """`mean |z| / 2` of an adder's responses, which are never positive; else `std(z) / 2`."""
    z = z.astype(jnp.float32)
    return jnp.where(z.max() <= 0, jnp.abs(z).mean(), z.std()) / 2


def mean(z: jax.Array, axis_name: str | None) -> jax.Array:
    """`[channels]`, means over places and the global batch."""
    return mean_over(axis_name, z.mean((0, 1, 2)))


def moments(a: jax.Array, b: jax.Array, axis_name: str | None) -> jax.Array:
    """`[channels of a, channels of b]`: means of `a_i b_j` over places and the global batch."""
    return mean_over(axis_name, sum_of_products(a, b) / math.prod(a.shape[:3]))


def own_moments(z: jax.Array, axis_name: str | None) -> jax.Array:
    """`moments(z, z)`, whose derivative costs one product instead of two equal ones."""
    half = moments(z, lax.stop_gradient(z), axis_name)
    return half + half.T - lax.stop_gradient(half)


def diagonal(matrix: jax.Array) -> jax.Array:
    """`jnp.diag` of a square matrix, whose derivative is no scatter."""
    return (matrix * jnp.eye(len(matrix))).sum(0)


def rho(weights: jax.Array | None, covariance: jax.Array | None, channels: int) -> jax.Array:
    """The matrix of rho: BatchNorm of centred responses, `weights`, and BatchNorm again.

    Args:
      weights: `[channels, channels']`; None for neither them nor the second BatchNorm.
      covariance: of the responses, `[channels, channels]`; None for no BatchNorm.
      channels: of the responses.
    """
    if covariance is None:
        return jnp.eye(channels) if weights is None else weights
    scale = lax.rsqrt(diagonal(covariance) + 1e-5)
    if weights is None:
        return scale * jnp.eye(channels)
    matrix = scale[:, None] * weights
    return matrix * lax.rsqrt(diagonal(matrix.T @ covariance @ matrix) + 1e-5)


def effective_rank(second: jax.Array) -> jax.Array:
    """Participation ratio `tr(C)^2 / tr(C^2)` of channels' second moments C, in [1, channels]."""
    second = lax.stop_gradient(second)
    return jnp.square(jnp.trace(second)) / jnp.maximum(jnp.square(second).sum(), 1e-12)


def pkkd(
    taps: str = "auto",
    kernel: bool = True,
    shared_sigma: bool = False,
    initial_sigma: float = 0.0,
    learn_sigma_student: bool = True,
    learn_sigma_teacher: bool = False,
    learn_rho_student: bool = True,
    learn_rho_teacher: bool = False,
    batch_norm: bool = True,
    max_exponent: float = 30.0,
) -> Distiller:
    """Matches responses of two networks' convolutions after a kernel and a 1x1 convolution.

        h = exp(z_a / (2 sigma_a^2))        z_a = -||x_a - f_a||_1, the student's raw response
        g = exp(z_c / (2 sigma_c^2))        z_c = x_c * f_c, the teacher's
        loss = mean over taps of mse(rho_a(h), rho_c(g))

    rho is BatchNorm without affine, where it learns a 1x1 convolution (identity at the start), and
    another BatchNorm. If both rhos learn, the loss has degenerate solutions: watch the effective
    ranks. Everything here is float32, and nothing of it is left at inference.

    Args:
      taps: see `pkkd_jax.distill.taps.pair_taps`; height and width of a pair must agree.
      kernel: False compares the raw responses (the paper's NK rows).
      shared_sigma: one sigma for all taps of a network instead of one for each tap.
      initial_sigma: both sigmas at the start; 0 takes them from the first batch:
        sigma^2 = mean |z| / 2 of adders and std(z) / 2 of ordinary convolutions.
      learn_sigma_student: whether sigma_a learns.
      learn_sigma_teacher: whether sigma_c learns.
      learn_rho_student: whether rho_a has its 1x1 convolution.
      learn_rho_teacher: whether rho_c has one.
      batch_norm: whether rho normalises. With the kernel nothing else brings the two networks to
        one scale, and a sigma's gradient soon is not finite without.
      max_exponent: bound on the kernels' exponents, which saturate there.
    Returns:
      A `Distiller` with parameters `{"sigma": ..., "rho": ...}`. Its metrics are `loss_mid`, and
      for each tap sigma_student, sigma_teacher, rank_student, rank_teacher (effective ranks of the
      two sides' covariances) and underflow (share of h at the bound, of the first examples).
    Raises:
      UserError: for arguments out of range; when applied, for taps whose shapes do not match.
    References:
      Xu et al., Kernel Based Progressive Distillation for Adder Neural Networks, NeurIPS 2020,
      Eqs. 6-12.
    """
    if not max_exponent > 0:
        raise UserError(f"{max_exponent=} of loss 'pkkd': it must be above 0, for example 30.0")
    if initial_sigma < 0:
        raise UserError(f"{initial_sigma=} of loss 'pkkd': it must be 0 (from data) or above")
    learns = {"student": learn_rho_student, "teacher": learn_rho_teacher}

    def pairs(student, teacher):
        found = pair_taps("pkkd", student, teacher, taps, same="size")
        for pair in found:
            if not any(learns.values()) and pair.student.shape != pair.teacher.shape:
                raise UserError(
                    f"loss 'pkkd' at tap {pair.name!r}: {pair.student.shape[-1]} channels of the"
                    f" student, {pair.teacher.shape[-1]} of the teacher: a rho must learn, for"
                    " example learn_rho_student=True"
                )
        return found

    def init(key, student, teacher):
        del key
        params = {"rho": {}, "sigma": {}}
        for tap, z_a, z_c in pairs(student, teacher):
            channels_a, channels_c = z_a.shape[-1], z_c.shape[-1]
            rho = {}
            if learns["student"]:
                rho["student"] = jnp.eye(channels_a, channels_c)
            if learns["teacher"]:
                width = channels_c if learns["student"] else channels_a
                rho["teacher"] = jnp.eye(channels_c, width)
            params["rho"][tap] = rho
            sigma2 = {"student": first_sigma2(z_a), "teacher": first_sigma2(z_c)}
            if initial_sigma:
                sigma2 = dict.fromkeys(sigma2, jnp.float32(initial_sigma**2))
            params["sigma"][tap] = {side: jnp.log(v + 1e-12) for side, v in sigma2.items()}
        if shared_sigma:
            shared = jax.tree.map(lambda *v: jnp.stack(v).mean(), *params["sigma"].values())
            params["sigma"] = {"shared": shared}
        return params if kernel else {"rho": params["rho"]}

    def sigmas(params, tap):
        sigma = params["sigma"]["shared" if shared_sigma else tap]
        learnt = {"student": learn_sigma_student, "teacher": learn_sigma_teacher}
        return [v if learnt[side] else lax.stop_gradient(v) for side, v in sorted(sigma.items())]

    @jax.default_matmul_precision("highest")  # differences of moments would magnify roundings
    def apply(params, student, teacher, axis_name):
        found, metrics = {}, {}
        for tap, z_a, z_c in pairs(student, teacher):
            z_a, z_c = z_a.astype(jnp.float32), z_c.astype(jnp.float32)
            if kernel:
                log_a, log_c = sigmas(params, tap)
                z_a = kernel_of(z_a, log_a, max_exponent)
                z_c = kernel_of(z_c, log_c, max_exponent)
                floor = jnp.exp(jnp.float32(-max_exponent)) * (1 + 1e-5)
                metrics[f"underflow/{tap}"] = (z_a[:UNDERFLOW_EXAMPLES] <= floor).mean()
                metrics[f"sigma_student/{tap}"] = jnp.exp(log_a / 2)
                metrics[f"sigma_teacher/{tap}"] = jnp.exp(log_c / 2)
            mean_a, mean_c = (mean(z, axis_name) for z in (z_a, z_c))
            # Centred by constants: the derivatives of products of centred responses sum to zero.
            z_a, z_c = z_a - lax.stop_gradient(mean_a), z_c - lax.stop_gradient(mean_c)
            aa, cc = own_moments(z_a, axis_name), own_moments(z_c, axis_name)
            ac = moments(z_a, z_c, axis_name)
            found[tap] = params["rho"][tap], aa, ac, cc, mean_a, mean_c
        # Small matrices, of which a GPU does those of many taps in the time of one.
        alike = collections.defaultdict(list)
        for tap, matrices in found.items():
            alike[tuple(a.shape for a in jax.tree.leaves(matrices))].append(tap)
        losses = []
        for taps in alike.values():
            stacked = jax.tree.map(lambda *a: jnp.stack(a), *(found[tap] for tap in taps))
            squares, *ranks = jax.vmap(compare)(*stacked)
            losses.append(squares.mean(1).sum())
            for i, tap in enumerate(taps):
                for side, rank in zip(("student", "teacher"), ranks, strict=True):
                    metrics[f"rank_{side}/{tap}"] = rank[i]
        loss = sum(losses) / len(found)
        return loss, {"loss_mid": loss, **metrics}

    def compare(weights, aa, ac, cc, mean_a, mean_c):
        """Of one tap: squared distances of rho's channels, and both sides' effective ranks."""
        a = rho(weights.get("student"), aa if batch_norm else None, len(aa))
        c = rho(weights.get("teacher"), cc if batch_norm else None, len(cc))
        # The responses of rho are never made: their moments say all that is asked of them.
        aa, ac, cc = a.T @ aa @ a, a.T @ ac @ c, c.T @ cc @ c
        squares = diagonal(aa - 2 * ac + cc)
        if not batch_norm:
            squares = squares + jnp.square(mean_a @ a - mean_c @ c)
        return squares, effective_rank(aa), effective_rank(cc)

    @jax.default_matmul_precision("highest")
    def stages(params, student, teacher):
        names = ("raw", "kernel", "rho") if kernel else ("raw", "rho")
        found = {stage: {"student": {}, "teacher": {}} for stage in names}
        for tap, *responses in pairs(student, teacher):
            for i, (side, z) in enumerate(zip(("student", "teacher"), responses, strict=True)):
                z = found["raw"][side][tap] = z.astype(jnp.float32)
                if kernel:
                    z = kernel_of(z, sigmas(params, tap)[i], max_exponent)
                    found["kernel"][side][tap] = z
                centred = z - mean(z, None)
                covariance = moments(centred, centred, None) if batch_norm else None
                learnt = params.get("rho", {}).get(tap, {}).get(side)  # nothing is stored of none
                matrix = rho(learnt, covariance, z.shape[-1])
                found["rho"][side][tap] = (centred if batch_norm else z) @ matrix
        return found

    return Distiller(init, apply, stages)
