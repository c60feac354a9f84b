"""Masks of sharded parameters are those of one device, and keep the sharding, on meshes of both kinds of axes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BODY = """
    import sys
    import jax, jax.numpy as jnp, numpy as np, pkjax as pk
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

    kinds = {"automatic": AxisType.Auto, "explicit": AxisType.Explicit}
    kind, ambient = kinds[sys.argv[1]], sys.argv[2] == "ambient"
    mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(kind, kind))
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in
              {"a": (6, 8), "b": (8, 4), "bias": (4,)}.items()}
    X = jnp.asarray(rng.normal(size=(4, 6)), jnp.float32)
    places = {"a": P("rows", "columns"), "b": P(None, "rows"), "bias": P()}
    sharded = {n: jax.device_put(p, NamedSharding(mesh, places[n])) for n, p in params.items()}
    spread = jax.device_put(X, NamedSharding(mesh, P("rows"))), jax.device_put(jnp.abs(X[:1]), NamedSharding(mesh, P()))

    def net(p, x):
        return jax.nn.relu(x @ p["a"]).reshape(-1, 8) @ p["b"] + p["bias"]

    def loss(p, x):
        return (net(p, x) ** 2).mean()

    scores = {
        "magnitude": lambda p, X, one: pk.magnitude(p),
        "random": lambda p, X, one: pk.random(p, key=jax.random.key(0)),
        "synflow": lambda p, X, one: pk.synflow(net, p, one),
        "snip": lambda p, X, one: pk.snip(loss, p, [X]),
        "grasp": lambda p, X, one: pk.grasp(loss, p, [X]),
        "px": lambda p, X, one: pk.path_exclusion(net, p, X),
        "trace": lambda p, X, one: pk.ntk_trace_saliency(net, p, X),
    }

    def close(one, other):
        top = max(float(jnp.abs(v).max()) for v in other.values())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * top), one, other)

    def check():
        plain = X, jnp.abs(X[:1])
        for name, score in scores.items():
            want = pk.prune(lambda p: score(p, *plain), params, density=0.4, steps=2)
            for data in (plain, spread):
                got = pk.prune(lambda p: score(p, *data), sharded, density=0.4, steps=2)
                assert got.kept == want.kept
                for n, mask in got.masks.items():
                    assert mask.sharding == sharded[n].sharding, (name, n, mask.sharding)
                    np.testing.assert_array_equal(mask, want.masks[n], err_msg=name)
                alone = score(sharded, *data)
                if name != "magnitude":
                    close(alone, score(params, *plain))
            print(name, "equal")
        again = pk.prune(pk.magnitude, sharded, density=0.2, masks=got.masks)
        assert all(m.sharding == sharded[n].sharding for n, m in again.masks.items())
        alone = pk.prune(pk.magnitude, params, density=0.2, masks=want.masks)
        jax.tree.map(np.testing.assert_array_equal, again.masks, alone.masks)
        assert pk.connectivity(net, sharded, X[:1], masks=got.masks).layers[0].kept == want.layers[0].kept
        print("done")

    if ambient:
        with jax.set_mesh(mesh):
            got = pk.prune(lambda p: pk.synflow(net, p, spread[1]), sharded, density=0.4, steps=2)
        want = pk.prune(lambda p: pk.synflow(net, p, jnp.abs(X[:1])), params, density=0.4, steps=2)
        jax.tree.map(np.testing.assert_array_equal, got.masks, want.masks)
        assert all(m.sharding == sharded[n].sharding for n, m in got.masks.items())
        print("done")
    else:
        check()
"""


@pytest.mark.parametrize(("kind", "mesh"), [("automatic", "given"), ("explicit", "given"), ("explicit", "ambient")])
def test_masks_of_sharded_parameters_keep_the_sharding(kind, mesh):
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", textwrap.dedent(BODY), kind, mesh], env=environment,
                          capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "done"
