"""The networks that are measured: timm's where timm is installed, else the same layers in plain torch.

`mobilenetv2_100`, `mobilenetv2_050` and `mobilenetv3_large_100` exist without timm, so that a machine with torch alone can
measure. Layer shapes: MobileNetV2 (arXiv 1801.04381, table 2) and MobileNetV3-Large (arXiv 1905.02244, table 1).
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profit
from profit.bn import reestimate_bn_
from profit_kernels import use_backend

# (expansion, channels, blocks, stride)
_V2 = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
# (kernel, expanded channels, channels, squeeze-and-excite, activation, stride)
_V3 = [
    (3, 16, 16, False, "relu", 1), (3, 64, 24, False, "relu", 2), (3, 72, 24, False, "relu", 1),
    (5, 72, 40, True, "relu", 2), (5, 120, 40, True, "relu", 1), (5, 120, 40, True, "relu", 1),
    (3, 240, 80, False, "hardswish", 2), (3, 200, 80, False, "hardswish", 1), (3, 184, 80, False, "hardswish", 1),
    (3, 184, 80, False, "hardswish", 1), (3, 480, 112, True, "hardswish", 1), (3, 672, 112, True, "hardswish", 1),
    (5, 672, 160, True, "hardswish", 2), (5, 960, 160, True, "hardswish", 1), (5, 960, 160, True, "hardswish", 1),
]  # fmt: skip
_ACTIVATIONS = {"relu": nn.ReLU, "relu6": nn.ReLU6, "hardswish": nn.Hardswish}
PLAIN = ("mobilenetv2_100", "mobilenetv2_050", "mobilenetv3_large_100")


def has_timm() -> bool:
    """Whether timm is installed."""
    return importlib.util.find_spec("timm") is not None


def check_name(name: str) -> str | None:
    """Why there is no network of this name, in one line; None if there is."""
    if name in PLAIN:
        return None
    if not has_timm():
        return f"there is no network {name!r} without timm; without it there are {', '.join(PLAIN)}"
    import timm

    return None if timm.is_model(name) else f"{name!r} is not a model of timm"


def create(name: str) -> nn.Module:
    """A freshly initialised full-precision network for 1000 classes, in training mode.

    Raises: ValueError for a name that is not known.
    """
    reason = check_name(name)
    if reason is not None:
        raise ValueError(reason)
    if has_timm():
        import timm

        return timm.create_model(name)
    return plain(name)


def plain(name: str) -> nn.Sequential:
    """One of PLAIN in plain torch."""
    return _mobilenetv3_large() if name == "mobilenetv3_large_100" else _mobilenetv2(int(name[-3:]) / 100)


def converted(name: str, images: Tensor, weight_bits: int | None = 4, act_bits: int | None = 4) -> nn.Module:
    """`create(name)` on the device of `images` [N, 3, H, W], converted, with BatchNorm and ranges set from the images.

    The same numbers for every backend: all of it is computed by the reference.
    """
    model = create(name).to(images.device, memory_format=torch.channels_last)
    with use_backend("reference"):
        profit.quantize_(model, profit.DuQConfig(weight_bits=None, act_bits=None), example_inputs=(images[:1],))
        reestimate_bn_(model, [images], 1)
        profit.set_bits(model, act_bits=act_bits)
        if act_bits is not None:
            profit.calibrate_(model, [images], batches=1)
        profit.set_bits(model, weight_bits=weight_bits)
    return model.train()


def _rounded(channels: float) -> int:
    """Channels as a multiple of 8, not more than a tenth below what was asked for."""
    value = max(8, int(channels + 4) // 8 * 8)
    return value + 8 if value < 0.9 * channels else value


def _conv(cin: int, cout: int, kernel: int = 1, stride: int = 1, groups: int = 1, activation: str = "") -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return [conv, nn.BatchNorm2d(cout), *([_ACTIVATIONS[activation]()] if activation else [])]


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = _rounded(channels / 4)
        self.reduce, self.act, self.expand = nn.Conv2d(channels, reduced, 1), nn.ReLU(), nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class _Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def _block(cin: int, middle: int, cout: int, kernel: int, stride: int, excite: bool, activation: str) -> nn.Module:
    """Inverted residual block."""
    layers = _conv(cin, middle, activation=activation) if middle != cin else []
    layers += _conv(middle, middle, kernel, stride, middle, activation)
    layers += [_SqueezeExcite(middle)] if excite else []
    body = nn.Sequential(*layers, *_conv(middle, cout))
    return _Residual(body) if stride == 1 and cin == cout else body


def _mobilenetv2(width: float) -> nn.Sequential:
    channels = _rounded(32 * width)
    layers = _conv(3, channels, 3, 2, activation="relu6")
    for expansion, out, blocks, stride in _V2:
        for i in range(blocks):
            cout = _rounded(out * width)
            layers.append(_block(channels, channels * expansion, cout, 3, stride if i == 0 else 1, False, "relu6"))
            channels = cout
    last = 1280  # not shrunk with the width, as in the paper
    head = [*_conv(channels, last, activation="relu6"), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, 1000)]
    return nn.Sequential(*layers, *head)


def _mobilenetv3_large() -> nn.Sequential:
    channels = 16
    layers = _conv(3, channels, 3, 2, activation="hardswish")
    for kernel, middle, cout, excite, activation, stride in _V3:
        layers.append(_block(channels, middle, cout, kernel, stride, excite, activation))
        channels = cout
    head = [*_conv(channels, 960, activation="hardswish"), nn.AdaptiveAvgPool2d(1), nn.Conv2d(960, 1280, 1), nn.Hardswish()]
    return nn.Sequential(*layers, *head, nn.Flatten(), nn.Linear(1280, 1000))
