"""The tangent kernel over several devices, and over several processes, is the one of a single device."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
NETWORK = """
    import sys
    import jax, jax.numpy as jnp, numpy as np
    jax.config.update("jax_enable_x64", True)
    if len(sys.argv) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))

    def net(p, x):
        x = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.maximum(x, 0.).mean((1, 2)) @ p["head"] + p["bias"]

    rng = np.random.default_rng(0)
    p = {"conv": jnp.asarray(rng.normal(size=(3, 3, 2, 4))), "head": jnp.asarray(rng.normal(size=(4, 3))),
         "bias": jnp.ones(3)}
    x = jnp.asarray(rng.normal(size=(11, 5, 5, 2)))
    masks = jax.tree.map(lambda v: jnp.asarray(rng.random(v.shape) < 0.5), p)
"""


def start(body, devices, *arguments):
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(NETWORK) + textwrap.dedent(body), *arguments],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out


def test_eight_devices_give_the_kernel_of_one():
    assert finish(start("""
        import pkjax as pk
        mesh = jax.make_mesh((4, 2), ("rows", "columns"))
        assert mesh.size == 8
        for options in ({}, {"masks": masks, "tile": 2}):
            want = pk.ntk(net, p, x, **options)
            np.testing.assert_allclose(pk.ntk(net, p, x, mesh=mesh, **options), want, rtol=1e-12, atol=1e-12)
        want = pk.ntk(net, p, x, x[:3] + 1)
        np.testing.assert_allclose(pk.ntk(net, p, x, x[:3] + 1, mesh=mesh), want, rtol=1e-12, atol=1e-12)
        plan = pk.ntk_plan(net, p, x, devices=8)
        assert plan.tiles >= 8, plan
        try:
            jax.jit(lambda p: pk.ntk(net, p, x, mesh=mesh))(p)
        except ValueError as error:
            assert "outside jit" in str(error), error
        else:
            raise AssertionError("no error")
        print("equal", plan.tiles)
    """, 8)).startswith("equal")


def test_two_processes_give_the_kernel_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    body = """
        import pkjax as pk
        mesh = jax.make_mesh((jax.device_count(),), ("devices",))
        assert (mesh.size, jax.local_device_count()) == (4, 2)
        got = pk.ntk(net, p, x, masks=masks, mesh=mesh)
        np.testing.assert_allclose(got, pk.ntk(net, p, x, masks=masks), rtol=1e-12, atol=1e-12)
        print("equal", got.shape)
    """
    processes = [start(body, 2, str(port), str(n)) for n in range(2)]
    try:
        assert [finish(process).splitlines()[-1] for process in processes] == ["equal (11, 11, 3, 3)"] * 2
    finally:
        for process in processes:
            process.kill()
