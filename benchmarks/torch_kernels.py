"""The tangent kernel by PyTorch's public `torch.func`, in the two ways of its documentation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap


def theta(network: nn.Module, implementation: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return X (N, …) → Θ (N, N, K, K) of a network in evaluation mode.

    Implementation 1 contracts Jacobians of single examples, 2 multiplies Θ of every pair by the unit vectors. Products
    are in float32 without TF32.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    params = {name: parameter.detach() for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def one(weights: dict[str, Any], x: torch.Tensor) -> torch.Tensor:
        return functional_call(network, (weights, buffers), (x[None],))[0]

    def contracted(X: torch.Tensor) -> torch.Tensor:
        leaves = vmap(jacrev(one), (None, 0))(params, X)
        total = None
        for leaf in leaves.values():
            rows = leaf.flatten(2)
            term = torch.einsum("nkp,mlp->nmkl", rows, rows)
            total = term if total is None else total + term
        return total

    def products(X: torch.Tensor) -> torch.Tensor:
        def pair(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            out, pull = vjp(lambda weights: one(weights, x), params)

            def column(e: torch.Tensor) -> torch.Tensor:
                return jvp(lambda weights: one(weights, y), (params,), (pull(e)[0],))[1]

            return vmap(column)(torch.eye(out.numel(), dtype=out.dtype, device=out.device))

        return vmap(lambda x: vmap(lambda y: pair(x, y))(X))(X)

    chosen = contracted if implementation == 1 else products

    def run(X: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return chosen(X)

    return run
