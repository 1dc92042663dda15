# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kernel space
#
# What an adder network and its convolutional teacher have in common, before and after the kernel,
# in two trainings that differ in the kernel alone. They are made by
#
#     python -m pkkd_jax.main --config=configs/resnet20.py --workdir=runs/kernel \
#       --config.batch_size=128 --config.epochs=10 --config.keep_evaluated=True
#     python -m pkkd_jax.main --config=configs/resnet20.py --workdir=runs/no_kernel \
#       --config.batch_size=128 --config.epochs=10 --config.keep_evaluated=True \
#       --config.distill.pkkd.kernel=False

# %%
# %matplotlib inline
import collections

import numpy as np

from pkkd_jax import analysis
from pkkd_jax.analysis import plots

# %% tags=["parameters"]
kernel = "../runs/kernel"
no_kernel = "../runs/no_kernel"
count = 512  # unseen images
data_dir = ""  # of prepared data sets; "" for the usual place

# %% [markdown]
# ## The two runs

# %%
run_dirs = {"kernel": kernel, "no kernel": no_kernel}
runs = {label: analysis.load(run_dir) for label, run_dir in run_dirs.items()}
images, labels = analysis.examples(runs["kernel"], count, data_dir=data_dir)
for label, run in runs.items():
    print(f"{label}: step {run.step}, {run.config['student']['conv']} student")
plots.learning_curves(run_dirs)

# %% [markdown]
# ## Filters
#
# The paper holds that filters of convolutions are Gaussian and those of adders Laplacian. Both
# distributions are fitted to every layer by maximum likelihood; Vuong's test says which is nearer,
# or that there is no telling. Here it holds: all adder layers of both students are nearer to
# Laplace, and 17 of the teacher's 20 convolutions to Gauss. (The teacher is the same in both
# trainings: nothing of the student reaches it.)

# %%
networks = {
    f"{label}, {which}": network
    for label, run in runs.items()
    for which, network in run.networks.items()
}
for name, network in networks.items():
    fits = {layer: analysis.fit(values) for layer, values in analysis.filters(network).items()}
    counts = collections.Counter(fit.better for layer, fit in fits.items() if layer != "stem")
    z = np.median([fit.z for layer, fit in fits.items() if layer != "stem"])
    print(f"{name:<20} {dict(counts)}, median z {z:.1f}")

# %%
run = runs["kernel"]
weights = {which: analysis.filters(run.networks[which]) for which in ("teacher", "student")}
plots.filter_histograms({"CNN": weights["teacher"], "ANN": weights["student"]})

# %%
first = list(weights["student"])[1]
plots.filter_images(weights["student"][first], f"first adder layer, {first}")

# %% [markdown]
# ## Responses before and after the kernel
#
# An adder's response is a negative distance, whose kernel lies between 0 and 1. A convolution's has
# both signs, and its exponential has a long tail, which rho keeps. Sigma of the student's kernel
# learns: it falls while the rate is highest, and then rises a little.

# %%
stages = {label: analysis.responses(run, images) for label, run in runs.items()}
taps = list(stages["kernel"]["raw"]["student"])
plots.response_histograms(stages["kernel"], taps[len(taps) // 2])

# %%
plots.sigmas(analysis.sigma_history(kernel))

# %% [markdown]
# ## Does the kernel make student and teacher more alike?
#
# Linear CKA compares the responses of the two networks to the same images, tap by tap: raw, after
# the kernel, and after rho, where PKKD's loss compares them.


# %%
alike = {
    f"{label}: {stage}": line
    for label, found in stages.items()
    for stage, line in analysis.similarities(found).items()
}
for name, line in alike.items():
    print(f"{name:<18} mean {np.mean(list(line.values())):.3f}")
plots.by_layer(alike, "linear CKA of student and teacher", (0, 1))

# %% [markdown]
# It does not, in these two runs: with the kernel the raw responses are less alike than without it,
# at eight of the nine taps, and so are those after rho. Right after the kernel they are least
# alike, in the first two blocks and in the last above all. The student with the kernel is 0.4
# points more accurate, of one run each; by this measure it copies the teacher less closely.
#
# Every convolution of the student against every one of the teacher, along the run with the kernel:

# %%
matrices, *every = analysis.along(kernel, images[:256])
plots.cka_heatmaps({f"step {step}": matrix for step, matrix in matrices.items()}, *every)

# %% [markdown]
# ## How many directions are used
#
# The effective rank of the channels' covariance. A loss that two sides can make zero by sharing one
# direction would show here. None has collapsed, and after rho the student uses fewer directions
# than the teacher.

# %%
ranks = {
    f"{which}, {stage}": {tap: analysis.effective_rank(z) for tap, z in sides[which].items()}
    for stage, sides in stages["kernel"].items()
    for which in sides
}
plots.by_layer(ranks, "effective rank (channels)", (0, None))

# %% [markdown]
# ## Zeros
#
# The share of exactly zero features that each layer is given. Adder networks are reported to be
# sparser than others; these students are a little less so than their teacher.

# %%
zeros = {name: analysis.zero_shares(network, images[:256]) for name, network in networks.items()}
plots.by_layer(zeros, "exactly zero (fraction)", (0, 1))

# %% [markdown]
# ## The classifier's input

# %%
plots.class_scatter(analysis.penultimate(run, images, "tsne"), labels)
