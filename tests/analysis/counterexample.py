"""The network that breaks the bound index by index."""

import jax.numpy as jnp


def counterexample():
    """Two separate linear chains, x → diag(w₁) x → diag(w₂) ·, with π = (1, 2) and ν = (2, 1) along them."""
    def net(w, x):
        return (x @ w["a"]) @ w["b"]
    w = {"a": jnp.diag(jnp.sqrt(jnp.array([0.5, 1.0]))), "b": jnp.diag(jnp.sqrt(jnp.array([0.5, 1.0])))}
    masks = {"a": jnp.eye(2, dtype=bool), "b": jnp.eye(2, dtype=bool)}
    return net, w, masks, jnp.diag(jnp.array([jnp.sqrt(2.0), 1.0]))
