"""Models have the sizes, shapes and initialisation that the literature gives them."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pkjax import adapters, models

from tests.cases import normal


def shapes(module, shape):
    return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))


def count(module, shape):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(module, shape)["params"]))


def fc_by_hand(inputs, width, depth, classes):
    return (inputs + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * classes


def vgg_by_hand(channels, classes):
    """3×3 kernels and biases, a scale and a shift per channel, a dense layer from 512 channels."""
    convs = sum(9 * a * b + b for a, b in zip((3, *channels), channels, strict=False))
    return convs + 2 * sum(channels) + 513 * classes


def resnet_by_hand(widths, blocks, classes, plain=False):
    """Kernels without bias, two numbers of BatchNorm (one bias if plain) per channel, 1×1 projections."""
    extra = 1 if plain else 2
    total, before = 27 * widths[0] + extra * widths[0], widths[0]
    for width, n in zip(widths, blocks, strict=True):
        total += 9 * before * width + (2 * n - 1) * 9 * width * width + 2 * n * extra * width
        total += (before * width + extra * width) * (before != width)
        before = width
    return total + (before + 1) * classes


@pytest.mark.parametrize(("width", "published"), [(100, 130_010), (500, 1_650_010), (2000, 21_600_010)])
def test_fc_has_the_parameters_of_its_formula(width, published):
    assert count(models.fc(width), (28, 28, 1)) == fc_by_hand(784, width, 6, 10) == published


@pytest.mark.parametrize(("name", "channels", "published"), [
    ("vgg11", (64, 128, 256, 256, 512, 512, 512, 512), 9_231_114),
    ("vgg16", (64,) * 2 + (128,) * 2 + (256,) * 3 + (512,) * 6, 14_728_266)])
def test_vgg_has_the_published_number_of_parameters(name, channels, published):
    model = getattr(models, name)
    assert count(model(), (32, 32, 3)) == vgg_by_hand(channels, 10) == published
    assert count(model(100, plain=True), (32, 32, 3)) == vgg_by_hand(channels, 100) - 2 * sum(channels)


@pytest.mark.parametrize(("name", "widths", "blocks", "published"), [
    ("resnet20", (16, 32, 64), (3, 3, 3), 272_474), ("wide_resnet20", (32, 64, 128), (3, 3, 3), 1_084_586),
    ("resnet18", (64, 128, 256, 512), (2,) * 4, 11_173_962),
    ("wide_resnet18", (128, 256, 512, 1024), (2,) * 4, 44_662_922)])
def test_resnet_has_the_published_number_of_parameters(name, widths, blocks, published):
    model = getattr(models, name)
    assert count(model(), (32, 32, 3)) == resnet_by_hand(widths, blocks, 10) == published
    assert count(model(plain=True), (32, 32, 3)) == resnet_by_hand(widths, blocks, 10, plain=True)


@pytest.mark.slow
def test_weights_are_kaiming_normal_and_biases_zero(key):
    params = models.fc(400).init(key, jnp.ones((1, 28, 28, 1), jnp.float32))["params"]
    for layer, fan_in in (("Dense_0", 784), ("Dense_1", 400)):
        kernel = np.asarray(params[layer]["kernel"], np.float64) * np.sqrt(fan_in / 2)
        assert abs(kernel.std() - 1) < 0.01
        assert abs((kernel ** 4).mean() - 3) < 0.1       # a truncated normal has 2.1
        assert not np.any(params[layer]["bias"])
    params = models.resnet20().init(key, jnp.ones((1, 8, 8, 3), jnp.float32))["params"]
    kernel = np.asarray(params["stage2_block1_conv0"]["kernel"], np.float64) * np.sqrt(9 * 64 / 2)
    assert abs(kernel.std() - 1) < 0.02


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("name", "size"), [pytest.param("vgg11", 32, marks=pytest.mark.slow),
                                            pytest.param("resnet20", 32, marks=pytest.mark.slow), ("resnet20", 8)])
def test_models_evaluate_in_float64_and_see_each_example_alone(key, name, size, plain):
    module = getattr(models, name)(7, plain=plain, param_dtype=jnp.float64)
    x = normal(0, (2, size, size, 3))
    variables = module.init(key, x)
    out = module.apply(variables, x, train=False)
    assert out.shape == (2, 7)
    assert out.dtype == jnp.float64
    assert np.abs(np.diff(out, axis=0)).max() > 1e-3
    np.testing.assert_allclose(module.apply(variables, x[:1], train=False), out[:1], rtol=1e-10)
    assert ("batch_stats" in variables) is not plain
    apply_fn, params = adapters.from_linen(module, variables)
    np.testing.assert_array_equal(apply_fn(params, x), out)


def test_average_pool_of_vgg_is_openlths_at_32_pixels():
    """With a final 2×2 average pool of stride 2 and a reshape, as OpenLTH writes it."""
    import flax.linen as nn

    with jax.numpy_dtype_promotion("standard"):
        x = normal(0, (2, 2, 2, 512), jnp.float32)
        np.testing.assert_allclose(nn.avg_pool(x, (2, 2), (2, 2)).reshape(2, -1), x.mean((1, 2)), rtol=1e-5)


def test_small_images_and_bad_sizes_are_refused(key):
    with pytest.raises(ValueError, match=r"at least 16×16 pixels, got a batch of shape \(1, 8, 8, 1\)"):
        models.vgg11().init(key, jnp.ones((1, 8, 8, 1), jnp.float32))
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        models.fc(0)
    with pytest.raises(AttributeError, match=r"no attribute 'vgg99'; it has convnext_tiny, fc, gpt"):
        models.vgg99  # noqa: B018


def test_importing_models_loads_no_flax():
    code = "import sys, pkjax.models; sys.exit('flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
