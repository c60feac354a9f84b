"""Path norms against numbers that others have published."""

import jax
import jax.numpy as jnp
import numpy as np
import pkjax as pk
import pytest

PUBLISHED = {1: 6.309489099057924e30, 2: 516.1198867529619, 4: 0.16706433037403792}
"""ℓq path norms of one draw of an untrained ResNet-18 at 3×224×224: github.com/agonon/pathnorm-pytorch,
quickstart.ipynb."""
SCALE = 1 / np.sqrt(1 + 1e-5)      # what an untrained, frozen BatchNorm does
WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)


def conv(x, kernel, stride=1):
    pad = kernel.shape[0] // 2
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC")) * SCALE


def resnet18(p, x):
    x = jax.nn.relu(conv(x, p["stem"], 2))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), [(0, 0), (1, 1), (1, 1), (0, 0)])
    for i in range(8):
        stride = 2 if f"{i}.skip" in p else 1
        y = conv(jax.nn.relu(conv(x, p[f"{i}.first"], stride)), p[f"{i}.second"])
        x = jax.nn.relu(y + (conv(x, p[f"{i}.skip"], stride) if stride == 2 else x))
    return x.mean((1, 2)) @ p["head"] + p["bias"]


def drawn(seed):
    """Normal kernels of variance 2 / (outputs · window), and a head that is uniform up to 1/√512, as its source has."""
    rng, last = np.random.default_rng(seed), 64
    kernels = {"stem": (7, 7, 3, 64)}
    for i, width in enumerate(WIDTHS):
        kernels |= {f"{i}.first": (3, 3, last, width), f"{i}.second": (3, 3, width, width)}
        kernels |= {f"{i}.skip": (1, 1, last, width)} if width != last else {}
        last = width
    params = {name: rng.normal(size=s) * np.sqrt(2 / (s[0] * s[1] * s[3])) for name, s in kernels.items()}
    params |= {"head": rng.uniform(-1, 1, (512, 1000)) / np.sqrt(512), "bias": rng.uniform(-1, 1, 1000) / np.sqrt(512)}
    return {name: jnp.asarray(v, jnp.float32) for name, v in params.items()}


@pytest.mark.slow
def test_the_norms_of_an_untrained_resnet18_are_the_published_ones_but_for_the_draw():
    """Draws differ by about 1 % (deviation of 1.1 %, 0.9 % and 0.8 % over four of them)."""
    x = jnp.ones((1, 224, 224, 3), jnp.float32)
    params = drawn(0)
    assert sum(v.size for v in params.values()) == 11_689_512 - 2 * 4800      # that of the source but γ and β
    for q, published in PUBLISHED.items():
        assert float(pk.paths.norm(resnet18, params, x, q=q)) == pytest.approx(published, rel=0.04)
