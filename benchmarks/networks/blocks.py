"""Lists of blocks for `MobileNet`, from the tables of the papers."""

from typing import Any

import flax.linen as nn

from benchmarks.networks.images import Activation, MobileNet


def mobilenet_v2(activation: Activation, slim: bool = False) -> MobileNet:
    """Build MobileNetV2 (Sandler et al. 2018, table 2) with ReLU6, as published, or another activation."""
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    if slim:
        stages, stem, last, classes = ((1, 4, 1, 1), (3, 6, 2, 2)), 4, 12, 3
    else:
        stem, last, classes = 32, 1280, 1000
    blocks, before = [], stem
    for expansion, out, repeats, stride in stages:
        for i in range(repeats):
            blocks.append((expansion * before, out, 3, 1 if i else stride, activation, 0))
            before = out
    return MobileNet(tuple(blocks), (stem, activation), (last,), classes=classes)


def efficientnet_b0(slim: bool = False) -> MobileNet:
    """Build EfficientNet-B0 (Tan and Le 2019, table 1): swish, and squeeze-and-excitation from the input's channels."""
    stages = ((1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5),
              (6, 192, 4, 2, 5), (6, 320, 1, 1, 3))
    stem, last, classes = 32, 1280, 1000
    if slim:
        stages, stem, last, classes = ((1, 4, 1, 1, 3), (3, 6, 2, 2, 5)), 4, 12, 3
    blocks, before = [], stem
    for expansion, out, repeats, stride, size in stages:
        for i in range(repeats):
            blocks.append((expansion * before, out, size, 1 if i else stride, nn.swish, before // 4))
            before = out
    return MobileNet(tuple(blocks), (stem, nn.swish), (last,), excited=nn.swish, classes=classes)


def mobilenet_v3(slim: bool = False) -> MobileNet:
    """Build MobileNetV3-Large (Howard et al. 2019, table 1)."""
    r, h = nn.relu, nn.hard_swish
    if slim:
        return MobileNet(((8, 4, 3, 1, r, 2), (12, 6, 5, 2, h, 3)), (4, h), (8, 10), gate=nn.hard_sigmoid, classes=3)
    blocks: Any = ((16, 16, 3, 1, r, 0), (64, 24, 3, 2, r, 0), (72, 24, 3, 1, r, 0), (72, 40, 5, 2, r, 24),
                   (120, 40, 5, 1, r, 32), (120, 40, 5, 1, r, 32), (240, 80, 3, 2, h, 0), (200, 80, 3, 1, h, 0),
                   (184, 80, 3, 1, h, 0), (184, 80, 3, 1, h, 0), (480, 112, 3, 1, h, 120), (672, 112, 3, 1, h, 168),
                   (672, 160, 5, 2, h, 168), (960, 160, 5, 1, h, 240), (960, 160, 5, 1, h, 240))
    return MobileNet(blocks, (16, h), (960, 1280), gate=nn.hard_sigmoid)
