"""Whole training steps on synthetic images: seconds, ratios, peak memory, growth.

python benchmarks/step.py [--batch_size 128] [--depth 20] [--image_size 32] [--turns 3]
    [--cases "ANN;CNN"] [--methods] [--peers] [--growth] [--json FILE]

Each case trains in a process of its own, after warming up; the cases take turns, and medians over
all turns are printed. On a GPU as many steps are under way as in a training. `--methods` adds the
other methods of distillation, `--peers` the same CNN in PyTorch (`pip install '.[peers]'`), which
has no augmentation in its step. `--growth` adds the time of an ANN step by batch size and by depth.
With JAX_COMPILATION_CACHE_DIR set, later processes of a case do not compile it again.
"""

import argparse
import collections
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from functools import partial

WARM_UP, STEPS, STEPS_GPU = 3, 12, 100
CASES = (
    "ANN",
    "CNN",  # its convolutional twin, with this package's convolution
    "CNN, XLA",  # the same with XLA's own; no other on a GPU
    "KD",  # teacher and student
    "PKKD",  # with the taps of the configuration
    "PKKD, 3x3",  # at every 3x3 layer
)
# Each with KD, as the tables have them.
METHODS = (
    "fitnets",
    "attention_transfer",
    "similarity_preserving",
    "fsp",
    "relational",
    "pkt",
    "correlation_congruence",
)
FIXED = ", fixed teacher"
PEER = "CNN, PyTorch"


def jax_step(case: str, depth: int, batch_size: int, image_size: int = 32):
    """A function that begins one step, and returns what waits for its end."""
    import jax
    import numpy as np
    import optax

    from pkkd_jax import config, devices, distill, models, optim, update
    from pkkd_jax.recipe import Recipe, hyperparameters, init_network, init_state

    name, classes = ("resnet_cifar", 10) if image_size < 64 else ("resnet_imagenet", 1000)

    def network(conv):
        return models.build(name, depth=depth, num_classes=classes, conv=conv)

    joint = case not in ("ANN", "CNN", "CNN, XLA")
    losses = config.losses(case.partition(",")[0].lower() if joint else "none")
    if case == "PKKD, 3x3":
        blocks = [f"stage{s}.block{b}" for s in (1, 2, 3) for b in range(1, (depth - 2) // 6 + 1)]
        taps = ",".join(f"{block}.conv{i}" for block in blocks for i in (1, 2))
        losses["pkkd"]["taps"] = taps
    recipe = Recipe(
        student=network("conv" if case.startswith("CNN") else "adder"),
        teacher=network("conv") if joint else None,
        teacher_learns=joint and not case.endswith(FIXED),
        losses=distill.build(losses, 1000),
        alpha=1.0,
        optimiser=optim.build(1000, momentum=0.9),
        distiller_optimiser=optax.sgd(0.1, momentum=0.9),
        augmentation=dict(augmentation="crop_flip", mean=(120.0,) * 3, std=(60.0,) * 3),
        seed=0,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8)
    labels = rng.integers(0, classes, batch_size).astype(np.int32)
    teacher = None
    if case.endswith(FIXED):
        teacher = init_network(recipe.teacher, jax.random.key(0), images.shape[1:])
    state = devices.replicate(init_state(recipe, images[:256], teacher))
    batch = {"image": images[None, None], "label": labels[None, None]}
    mapped = devices.pmap(update.joint_update(recipe), hyperparameters(recipe), donate=True)

    def step():
        nonlocal state
        state, metrics = mapped(state, batch)
        return partial(jax.block_until_ready, metrics)

    return step


def torch_step(depth: int, batch_size: int, channels_last: bool):
    """The CIFAR ResNet of the same depth, momentum and weight decay in PyTorch."""
    import torch
    from torch import nn

    def layer(c_in, c_out, size, stride=1):
        convolution = nn.Conv2d(c_in, c_out, size, stride, size // 2, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(c_out))

    class Block(nn.Module):
        def __init__(self, c_in, c_out, stride):
            super().__init__()
            self.first = layer(c_in, c_out, 3, stride)
            self.second = layer(c_out, c_out, 3)
            same = c_in == c_out and stride == 1
            self.shortcut = nn.Identity() if same else layer(c_in, c_out, 1, stride)

        def forward(self, x):
            y = self.second(torch.relu(self.first(x)))
            return torch.relu(y + self.shortcut(x))

    blocks, width = [], 16
    for stage, features in enumerate((16, 32, 64)):
        for block in range((depth - 2) // 6):
            blocks.append(Block(width, features, 2 if stage and not block else 1))
            width = features
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10, bias=False)]
    model = nn.Sequential(layer(3, 16, 3), nn.ReLU(), *blocks, *head, nn.BatchNorm1d(10))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device, memory_format=layout)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    images = torch.randn(batch_size, 3, 32, 32, device=device).to(memory_format=layout)
    labels = torch.randint(10, (batch_size,), device=device)

    def step():
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimiser.step()
        if device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    return step


def peak_mb(of_torch: bool) -> float:
    """Peak memory so far: of the device if it has its own, else of this process."""
    if of_torch:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() / 1e6
    else:
        import jax

        if figures := jax.devices()[0].memory_stats():
            return figures["peak_bytes_in_use"] / 1e6
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def measure(case: str, depth: int, batch_size: int, image_size: int) -> dict:
    """Seconds of each step, and peak memory in MB before the first and at the end."""
    if case.startswith(PEER):
        make = lambda: torch_step(depth, batch_size, case.endswith("last"))  # noqa: E731
        import torch

        gpu = torch.cuda.is_available()
    else:
        make = lambda: jax_step(case, depth, batch_size, image_size)  # noqa: E731
        import jax

        from pkkd_jax import memory
        from pkkd_jax.ops import adder

        memory.keep()  # as a training does
        gpu = jax.devices()[0].platform == "gpu"
    before = peak_mb(case.startswith(PEER))
    step, seconds = make(), []
    for _ in range(WARM_UP):
        step()()
    if not case.startswith(PEER):
        memory.trim()
    step()()
    under_way: collections.deque = collections.deque()
    for _ in range(STEPS_GPU if gpu else STEPS):
        begin = time.perf_counter()
        under_way.append(step())
        if len(under_way) > (2 if gpu else 0):
            under_way.popleft()()
        seconds.append(time.perf_counter() - begin)
    found = {"seconds": seconds, "before_mb": before, "peak_mb": peak_mb(case.startswith(PEER))}
    if not case.startswith(PEER):
        found["where"] = f"{jax.devices()[0].device_kind}, jax {jax.__version__}"
        found["where"] += f", adder op: {adder.implementation()}"
    return found


def in_process(case: str, depth: int, batch_size: int, image_size: int = 32) -> dict:
    """`measure` in a new process, on its default device."""
    command = [sys.executable, __file__, "--case", case, "--depth", str(depth)]
    command += ["--batch_size", str(batch_size), "--image_size", str(image_size)]
    environment = dict(os.environ, XLA_FLAGS="")  # which may split a CPU into devices
    if case == "CNN, XLA":
        environment["PKKD_JAX_ADDER"] = "portable"
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    text = done.stdout
    return json.loads(text.splitlines()[-1])


def fit(xs, ys) -> tuple[float, float, list[float]]:
    """Least squares of the relative residuals of `a + b x`: a, b, and those residuals."""
    import numpy as np

    rows = np.stack([np.ones(len(xs)), xs], 1) / np.array(ys)[:, None]
    a, b = np.linalg.lstsq(rows, np.ones(len(xs)))[0]
    return float(a), float(b), [float((a + b * x) / y - 1) for x, y in zip(xs, ys, strict=True)]


def grow(title: str, xs, points) -> dict:
    """Prints the ANN step's seconds at `points`, (depth, batch size), over `xs`, and the fit."""
    seconds = [statistics.median(in_process("ANN", *p)["seconds"]) for p in points]
    a, b, residuals = fit(xs, seconds)
    print(f"\n{title:>20} {'s/step':>8} {'residual':>9}")
    for x, second, residual in zip(xs, seconds, residuals, strict=True):
        print(f"{x:>20.4g} {second:>8.3f} {residual:>9.1%}")
    print(f"a = {a:.4g} s, b = {b:.4g} s each")
    return {"x": list(xs), "seconds": seconds, "a": a, "b": b, "residuals": residuals}


def adder_terms(depth: int) -> float:
    """Terms of one image in the adder layers of the forward pass."""
    blocks, terms, width = (depth - 2) // 6, 0, 16
    for stage, features in enumerate((16, 32, 64)):
        pixels = (32 >> stage) ** 2
        for block in range(blocks):
            terms += 9 * pixels * features * (width + features)
            terms += pixels * features * width if stage and not block else 0
            width = features
    return float(terms)


def main() -> None:
    """Runs all cases, or one for `in_process`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=20, help="6n + 2; 18, 34, 50, ... of 224")
    parser.add_argument("--image_size", type=int, default=32, help="224 for ResNets of ImageNet")
    parser.add_argument("--cases", default=";".join(CASES), help="of these, between semicolons")
    parser.add_argument("--turns", type=int, default=3, help="processes of each case")
    parser.add_argument("--methods", action="store_true", help="other methods of distillation too")
    parser.add_argument("--peers", action="store_true", help="PyTorch too")
    parser.add_argument("--growth", action="store_true", help="by batch size and depth too")
    parser.add_argument("--json", help="file for all figures")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    depth, batch_size = arguments.depth, arguments.batch_size
    if arguments.case:
        print(json.dumps(measure(arguments.case, depth, batch_size, arguments.image_size)))
        return
    cases = arguments.cases.split(";")
    if unknown := set(cases) - set(CASES):
        parser.error(f"--cases: {sorted(unknown)}; allowed: {'; '.join(CASES)}")
    if arguments.image_size != 32 and (arguments.peers or arguments.growth):
        parser.error("--peers and --growth are of networks for 32 x 32: leave out --image_size")
    if arguments.methods:
        cases += [f"{case}{FIXED}" for case in ("KD", "PKKD")]
        cases += [f"{method}+kd" for method in METHODS]
    if arguments.peers:
        import torch

        print(f"PyTorch {torch.__version__}, {torch.get_num_threads()} threads")
        cases += [f"{PEER}, contiguous", f"{PEER}, channels last"]
    found: dict[str, list] = {case: [] for case in cases}
    for _ in range(arguments.turns):
        for case, runs in found.items():
            runs.append(in_process(case, depth, batch_size, arguments.image_size))
    seconds = {
        c: statistics.median(s for r in runs for s in r["seconds"]) for c, runs in found.items()
    }
    memory = {c: statistics.median(r["peak_mb"] for r in runs) for c, runs in found.items()}
    first = found[cases[0]][0]
    print(f"ResNet-{depth}, batch {batch_size}, {os.cpu_count()} cores, {first['where']}")
    print(f"a process without a step: {first['before_mb']:.0f} MB")
    print(f"{'':>28} {'ms/step':>8} {'of ' + cases[0]:>7} {'img/s':>7} {'peak MB':>8}")
    for case in cases:
        rate = batch_size / seconds[case]
        share = seconds[case] / seconds[cases[0]]
        ms = 1e3 * seconds[case]
        print(f"{case:>28} {ms:>8.1f} {share:>7.2f} {rate:>7.0f} {memory[case]:>8.0f}")
    parts = {
        "PKKD / (ANN + CNN)": (seconds, "PKKD", "ANN", "CNN"),
        "PKKD / KD": (seconds, "PKKD", "KD"),
        "PKKD at every 3x3 layer / KD": (seconds, "PKKD, 3x3", "KD"),
        "ANN / CNN with XLA's convolution": (seconds, "ANN", "CNN, XLA"),
        "peak memory, ANN / CNN with XLA's convolution": (memory, "ANN", "CNN, XLA"),
        "peak memory, ANN / CNN": (memory, "ANN", "CNN"),
    }
    ratios = {
        name: figures[case] / sum(figures[other] for other in others)
        for name, (figures, case, *others) in parts.items()
        if {case, *others} <= set(cases)
    }
    if arguments.peers:
        best = min(value for case, value in seconds.items() if case.startswith(PEER))
        ratios["ANN / the faster PyTorch CNN"] = seconds["ANN"] / best
    print()
    for name, ratio in ratios.items():
        print(f"{name}: {ratio:.2f}")
    result = {"cases": found, "seconds": seconds, "peak_mb": memory, "ratios": ratios}
    if arguments.growth:
        sizes = (16, 32, 64, 128, 256, 512)
        result["by_batch"] = grow("batch size", sizes, [(20, size) for size in sizes])
        depths = (8, 14, 20, 32, 44, 56)
        terms = [adder_terms(d) * 128 for d in depths]
        result["by_terms"] = grow("terms of a forward", terms, [(d, 128) for d in depths])
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
