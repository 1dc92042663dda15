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
# # First steps
#
# An adder network answers with the negative L1 distance between a patch and a filter, so its
# convolutions only add. Here one is trained on the digits that scikit-learn brings along, with a
# convolutional teacher of the same architecture in the same step (PKKD). Then a loss and a network
# of one's own take the place of the package's.

# %%
# %matplotlib inline
import jax
import numpy as np
from flax import linen
from IPython.display import display

from pkkd_jax import analysis, config, cost, memory, nn, train
from pkkd_jax.analysis import plots
from pkkd_jax.distill import Distiller

memory.keep()  # on a CPU, what a step frees is kept for the next one

# %% tags=["parameters"]
folder = "../runs/first_steps"  # of the run directories; delete it to train anew
epochs = 30

# %% [markdown]
# ## What is trained
#
# A configuration is a tree whose nested parts are keyword arguments: of the networks, of the
# losses, of the data. `base` is the paper's recipe on CIFAR-10; a few leaves make it one for
# digits.


# %%
def digits():
    chosen = config.base()
    chosen.data = dict(name="digits", data_dir="", validation=0, augmentation="none")
    chosen.student.depth = chosen.teacher.depth = 8
    chosen.batch_size, chosen.epochs = 64, epochs
    chosen.log_every_steps, chosen.eval.every_epochs = 20, epochs / 10
    return chosen


pkkd = digits()
print(pkkd.student, pkkd.distill, sep="\n")

# %% [markdown]
# `cost` counts what one image takes, in the trace of the network itself. The convolutional twin
# multiplies as often as it adds; the adder network hardly multiplies.

# %%
arguments = {**pkkd.student, "num_classes": 10}
print(cost.text({name: c for name, c in cost.twins(arguments, (8, 8, 1)).items() if name != "bnn"}))

# %% [markdown]
# ## Training, with live curves
#
# `train_and_evaluate` is what the command line calls. It calls back at every interval, here to draw
# the curves anew. The directory is an ordinary run directory: `python -m pkkd_jax.evaluate` and
# `python -m pkkd_jax.report` take it, and a training that was interrupted goes on where it was.


# %%
def train_with_curves(chosen, name):
    run_dir = f"{folder}/{name}"
    picture = display(display_id=True)

    def redraw(figures):
        if "images_per_s" not in figures and figures["step"] > 1:  # after an evaluation
            picture.update(plots.learning_curves({"": run_dir}))

    results = train.train_and_evaluate(chosen, run_dir, at_interval=redraw)
    for network in ("student", "teacher"):
        print(f"{network}: {results[f'test/{network}/accuracy']:.1%} of the test images")
    return run_dir


pkkd_run = train_with_curves(pkkd, "pkkd")

# %% [markdown]
# ## What it looks like inside
#
# `analysis` reads the run. The responses that PKKD compares are the raw outputs of teacher and
# student at the end of each block, after a kernel, and after a 1x1 convolution called rho.

# %%
run = analysis.load(pkkd_run)
images, labels = analysis.examples(run, 256)
stages = analysis.responses(run, images)
for stage, alike in analysis.similarities(stages).items():
    values = np.round(list(alike.values()), 2)
    print(f"{stage:<6} linear CKA of student and teacher, block by block: {values}")

# %%
plots.response_histograms(stages, "stage2.block1.conv2")

# %%
plots.class_scatter(analysis.penultimate(run, images, "tsne"), labels)

# %% [markdown]
# ## A loss of one's own
#
# A loss is a pair of functions: `init` returns what it learns (here nothing), `apply` the loss and
# what is to be logged. In a file `my_loss.py` its name would be `my_loss.logit_matching`; in a
# notebook the module is called `__main__`. Keywords become leaves of the configuration.


# %%
def logit_matching(scale=1.0):
    def apply(params, student, teacher, axis_name):
        loss = scale * ((student.logits - teacher.logits) ** 2).mean()
        return loss, {"loss_logits": loss}

    return Distiller(lambda key, student, teacher: {}, apply)


mine = digits()
mine.distill = config.losses("__main__.logit_matching")
print(mine.distill)

# %% [markdown]
# ## A network of one's own
#
# A network is a Linen module with the fields `num_classes`, `conv` and `bn_axis_name`, that returns
# logits and named features. `nn.convolution(conv)` is the layer that `conv` names, so the same
# module serves as adder student and as convolutional teacher.


# %%
class Tiny(linen.Module):
    num_classes: int
    conv: str = "conv"
    bn_axis_name: str | None = None

    @linen.compact
    def __call__(self, x, *, train):
        features = {}
        for i, width in enumerate((16, 32), 1):
            x = nn.convolution(self.conv)(width, (3, 3), strides=i, use_bias=False)(x)
            features[f"conv{i}"] = x
            x = jax.nn.relu(
                linen.BatchNorm(not train, momentum=0.9, axis_name=self.bn_axis_name)(x)
            )
        x = features["penultimate"] = x.mean((1, 2))
        return nn.Outputs(linen.Dense(self.num_classes)(x), features)


mine.student = dict(name="__main__.Tiny", conv="adder")
mine.teacher = dict(
    mode="progressive", run_dir="", which="teacher", name="__main__.Tiny", conv="conv"
)
own_run = train_with_curves(mine, "mine")

# %% [markdown]
# Both runs side by side, on images that the training has not seen.

# %%
plots.learning_curves({"PKKD, ResNet-8": pkkd_run, "own loss, own network": own_run})
