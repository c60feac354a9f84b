"""Time the structured engine against neural-tangents on FC-100 (784 - 6 × 100 - 10): medians, compiled, float32."""

import statistics
import sys
import time

import jax
import jax.numpy as jnp
from pkjax.ntk import ntk


def fc100(params, x):
    for w, b in params[:-1]:
        x = jax.nn.relu(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def main(counts=(32, 100), repeats=5):
    widths = [784, *[100] * 6, 10]
    keys = jax.random.split(jax.random.key(0), len(widths))
    params = [(jax.random.normal(k, (i, o)) * (2 / i) ** 0.5, jnp.zeros(o))
              for k, i, o in zip(keys[:-1], widths[:-1], widths[1:], strict=True)]
    masks = [(jax.random.bernoulli(k, 0.1, w.shape), jnp.ones(b.shape, bool))
             for k, (w, b) in zip(keys[:-1], params, strict=True)]
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for n in counts:
        x = jax.random.normal(keys[-1], (n, 784))
        reference = None
        for name, engine, m in (("neural-tangents", "neural-tangents", None), ("jacobian", "jacobian", None),
                                ("structured", "structured", None), ("structured, masked to 10 %", "structured", masks),
                                ("jacobian, masked to 10 %", "jacobian", masks)):
            start = time.perf_counter()
            theta = ntk(fc100, params, x, engine=engine, masks=m).block_until_ready()
            first = time.perf_counter() - start
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                ntk(fc100, params, x, engine=engine, masks=m).block_until_ready()
                times.append(time.perf_counter() - start)
            if m is None:
                reference = theta if reference is None else reference
                note = f"differs by {float(abs(theta - reference).max() / abs(reference).max()):.1e}"
            else:
                note = ""
            print(f"N = {n:4d}  {name:28s} median {statistics.median(times):8.3f} s  (first {first:6.2f} s)  {note}")


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or (32, 100))
