"""The pruning networks and SynFlow's loop in PyTorch, by its public calls: the other side of the comparison.

Modules carry the names of the Flax modules in `pkjax.models`, so that weights can be copied by name.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch
from pkjax.trees import leaf_names
from torch import nn

ATTRIBUTES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


class ResNet(nn.Module):
    """A residual network for small images with shortcuts of option B, as `pkjax.models.resnet20` and its siblings."""

    def __init__(self, widths: Sequence[int], blocks: Sequence[int]):
        super().__init__()
        self.names: list[str] = []
        self._unit("stem", 3, widths[0], 3, 1)
        inputs = widths[0]
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            for block in range(count):
                name, stride = f"stage{stage}_block{block}", 2 if stage > 0 and block == 0 else 1
                self._unit(f"{name}_conv0", inputs, width, 3, stride)
                self._unit(f"{name}_conv1", width, width, 3, 1)
                if stride == 2:
                    self._unit(f"{name}_shortcut", inputs, width, 1, stride)
                self.names.append(name)
                inputs = width
        self.head = nn.Linear(inputs, 10)

    def _unit(self, name, inputs, outputs, size, stride):
        setattr(self, name, nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False))
        setattr(self, f"{name}_norm", nn.BatchNorm2d(outputs))

    def forward(self, x):
        """Map images (N, 3, H, W) to logits (N, 10)."""
        def unit(h, name):
            return getattr(self, f"{name}_norm")(getattr(self, name)(h))

        h = torch.relu(unit(x, "stem"))
        for name in self.names:
            out = unit(torch.relu(unit(h, f"{name}_conv0")), f"{name}_conv1")
            h = torch.relu(out + (unit(h, f"{name}_shortcut") if hasattr(self, f"{name}_shortcut") else h))
        return self.head(h.mean((2, 3)))


def resnet20() -> nn.Module:
    """ResNet-20 for CIFAR, as `pkjax.models.resnet20`."""
    return ResNet((16, 32, 64), (3, 3, 3))


def resnet18() -> nn.Module:
    """ResNet-18 for small images, as `pkjax.models.resnet18`."""
    return ResNet((64, 128, 256, 512), (2, 2, 2, 2))


def fc(width: int, depth: int = 6, inputs: int = 784) -> nn.Module:
    """Fully connected ReLU network, as `pkjax.models.fc`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, (n, m) in enumerate(zip([inputs] + [width] * (depth - 1), [width] * depth, strict=True)):
        layers[f"Dense_{i}"], layers[f"ReLU_{i}"] = nn.Linear(n, m), nn.ReLU()
    layers[f"Dense_{depth}"] = nn.Linear(width, 10)
    return nn.Sequential(layers)


def vgg16() -> nn.Module:
    """VGG-16 with BatchNorm for 32×32 images, as `pkjax.models.vgg16`."""
    plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs, i = 3, 0
    for at, step in enumerate(plan):
        if isinstance(step, str):
            layers[f"MaxPool_{at}"] = nn.MaxPool2d(2)
            continue
        layers[f"Conv_{i}"] = nn.Conv2d(inputs, step, 3, padding=1)
        layers[f"BatchNorm_{i}"], layers[f"ReLU_{i}"] = nn.BatchNorm2d(step), nn.ReLU()
        inputs, i = step, i + 1
    layers["average"], layers["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    layers["Dense_0"] = nn.Linear(512, 10)
    return nn.Sequential(layers)


def load(network: nn.Module, variables: Mapping[str, Any]) -> nn.Module:
    """Copy Flax variables into the module of the same names, and put it into evaluation mode.

    Raises ValueError unless every parameter and running average is filled exactly once.
    """
    state = {}
    for collection in variables.values():
        for name, leaf in zip(leaf_names(collection), jax.tree.leaves(collection), strict=True):
            module, kind = name.rsplit("/", 1)
            value = np.asarray(leaf)
            state[f"{module}.{ATTRIBUTES[kind]}"] = torch.tensor(to_torch(value) if kind == "kernel" else value)
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise ValueError(f"the networks differ: PyTorch's alone has {missing}, Flax's alone {unexpected}")
    return network.eval()


def to_torch(kernel: np.ndarray) -> np.ndarray:
    """From (in, out) to (out, in), and from (height, width, in, out) to (out, in, height, width)."""
    return np.ascontiguousarray(kernel.T if kernel.ndim == 2 else kernel.transpose(3, 2, 0, 1))


def from_torch(weight: torch.Tensor) -> np.ndarray:
    """Undo `to_torch`."""
    return (weight.T if weight.ndim == 2 else weight.permute(2, 3, 1, 0)).cpu().numpy()


@contextlib.contextmanager
def linearised(network: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Put |θ| in the place of every parameter for a while; yields the kernels by name, which alone get gradients."""
    theta = dict(network.named_parameters())
    kernels = {}
    for name, parameter in theta.items():
        module, attribute = name.rsplit(".", 1)
        size = nn.Parameter(parameter.detach().abs(), requires_grad=parameter.ndim > 1)
        setattr(network.get_submodule(module), attribute, size)
        if parameter.ndim > 1:
            kernels[f"{module.replace('.', '/')}/kernel"] = size
    try:
        yield kernels
    finally:
        for name, parameter in theta.items():
            module, attribute = name.rsplit(".", 1)
            setattr(network.get_submodule(module), attribute, parameter)


def split(flat: torch.Tensor, kernels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Views of one long vector in the shapes of the kernels."""
    return [part.view_as(k) for part, k in zip(flat.split([k.numel() for k in kernels]), kernels, strict=True)]


def score(network: nn.Module, x: torch.Tensor, kernels: Sequence[torch.Tensor], out: Sequence[torch.Tensor]) -> None:
    """Write θ ∘ ∂R/∂θ of a linearised network. Every factor is ≥ 0, so that |·| needs no pass of its own."""
    gradients = torch.autograd.grad(network(x).sum(), kernels)
    with torch.no_grad():
        for gradient, kernel, part in zip(gradients, kernels, out, strict=True):
            torch.mul(gradient, kernel, out=part)


def prune(network: nn.Module, x: torch.Tensor, counts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Prune by SynFlow, step by step to the counts given; the network is left as it was.

    Weights become |θ| once. Each step: multiply them by the masks, forward pass of ones, gradients, scores side by
    side in one vector, `kthvalue`, masks = score > threshold. Ties at the threshold fall, as in the published
    algorithm. Source: Tanaka et al. 2020, algorithm 1.

    Returns masks of 0 and 1 by kernel, in PyTorch's layout.
    """
    with linearised(network) as named:
        kernels = list(named.values())
        total = sum(k.numel() for k in kernels)
        flat, alive = torch.empty(total, device=x.device), torch.ones(total, device=x.device)
        scores, masks = split(flat, kernels), split(alive, kernels)
        for count in counts:
            with torch.no_grad():
                for kernel, mask in zip(kernels, masks, strict=True):
                    kernel.mul_(mask)
            score(network, x, kernels, scores)
            if count < total:
                threshold = torch.kthvalue(flat, total - count).values
                torch.gt(flat, threshold, out=alive)  # masks of floats: multiplied far faster than booleans
        return dict(zip(named, masks, strict=True))
