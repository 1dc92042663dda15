"""The convolution and two adders of PyTorch, on the layers that `adder.py` measures."""

import torch
from layers import shapes
from torch.nn import functional


def torch_passes(layer) -> dict:
    """Names of peers to their passes: convolution in both layouts, cdist and broadcasting."""
    (n, h, width, c_in), (size, _, _, c_out), y_shape, _ = shapes(layer)
    stride, padding = (layer[6],) * 2, (size // 2,) * 2
    found = {}
    for name, layout in (
        ("contiguous", torch.contiguous_format),
        ("channels last", torch.channels_last),
    ):
        x = torch.randn(n, c_in, h, width).to(memory_format=layout)
        w = torch.randn(c_out, c_in, size, size).to(memory_format=layout)
        dy = torch.randn(n, c_out, *y_shape[1:3]).to(memory_format=layout)

        def backward(mask, x=x, w=w, dy=dy):
            return torch.ops.aten.convolution_backward(
                dy, x, w, None, stride, padding, (1, 1), False, (0, 0), 1, mask
            )

        found[f"convolution, {name}"] = {
            "forward": lambda x=x, w=w: functional.conv2d(x, w, None, stride, padding),
            "dx": lambda f=backward: f((True, False, False)),
            "dw": lambda f=backward: f((False, True, False)),
        }
    x, w = torch.randn(n, c_in, h, width), torch.randn(c_out, c_in * size * size)

    def patches():
        columns = functional.unfold(x, size, 1, padding, stride)
        return columns.transpose(1, 2).reshape(-1, w.shape[1])

    def broadcasting():
        columns = patches()
        # Filter by filter: all at once would take gigabytes.
        return torch.stack([-(columns - f).abs().sum(1) for f in w], 1)

    found["cdist"] = {"forward": lambda: -torch.cdist(patches(), w, p=1)}
    found["broadcasting adder"] = {"forward": broadcasting}

    def repeated(one):
        def run(calls):
            for _ in range(calls):
                one()

        return run

    return {n: {p: repeated(f) for p, f in passes.items()} for n, passes in found.items()}
