"""The smallest of each NNX network of images and tokens."""

import functools

import jax
import jax.numpy as jnp
import pkjax as pk
from flax import nnx
from pkjax import models

from tests.cases import FLOAT, normal

IMAGES = normal(9, (2, 8, 8, 2))
TOKENS = jnp.array([[1, 2, 0], [4, 4, 3]])
TINY = {
    "vit": (models.vit_tiny, {"image": 8, "patch": 4, "depth": 2, "width": 4, "heads": 2, "channels": 2}, IMAGES),
    "mixer": (models.mlp_mixer, {"image": 8, "patch": 4, "depth": 1, "width": 4, "channels": 2}, IMAGES),
    "convnext": (models.convnext_tiny, {"patch": 2, "depths": (1, 1), "widths": (4, 6), "channels": 2}, IMAGES),
    "gpt": (models.gpt, {"context": 4, "depth": 1, "width": 4, "heads": 2, "last": False}, TOKENS),
    "gpt's last": (models.gpt, {"context": 4, "depth": 1, "width": 4, "heads": 2, "last": True}, TOKENS),
}


def built(name, seed=0):
    build, sizes, _ = TINY[name]
    return build(5, param_dtype=FLOAT, rngs=nnx.Rngs(seed), **sizes)


@functools.cache
def problem(name):
    """A network with parameters of order 1, biases and scales included, and a batch."""
    apply_fn, params = pk.from_nnx(built(name))
    leaves, structure = jax.tree.flatten(params)
    params = jax.tree.unflatten(structure, [0.5 * normal(i, leaf.shape) for i, leaf in enumerate(leaves)])
    return apply_fn, params, TINY[name][2]
