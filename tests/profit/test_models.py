"""Networks by name, and the demo net."""

from __future__ import annotations

import pytest
import torch

from profit import quantize_
from profit.config import DuQConfig
from profit.errors import RecipeError
from profit.models import create_model


def _demo(**args):
    return create_model("digits_mobilenetv3", classes=10, in_chans=1, args=args)


def test_demo_net_has_the_promised_size_and_shape() -> None:
    model = _demo()
    parameters = sum(p.numel() for p in model.parameters())
    assert 14_000 <= parameters <= 50_000
    seen = []
    last = model.blocks[-1].conv_dw
    last.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[-1]))
    assert model(torch.randn(2, 1, 16, 16)).shape == (2, 10)
    assert last.kernel_size == (5, 5) and seen == [4], "the last 5 x 5 sees a map that it does not cover with padding alone"
    assert model.conv_stem.stride == (1, 1)


def test_demo_net_offers_every_kind_of_input() -> None:
    model = _demo()
    table = quantize_(model, DuQConfig(weight_bits=None, act_bits=None), (torch.randn(2, 1, 16, 16),))
    kinds = [row.kind for row in table]
    assert kinds.count("raw") == 1
    assert {"unsigned", "offset", "signed"} <= set(kinds)
    negative = [row.name for row in table if row.pad_value == -0.375]
    assert len(negative) >= 3, "depthwise convolutions behind an h-swish are negative-padded"


def test_width_scales_the_demo_net() -> None:
    count = [sum(p.numel() for p in _demo(width=width).parameters()) for width in (0.5, 1.0, 2.0)]
    assert count == sorted(count) and count[2] > 2 * count[0]


def test_timm_models_by_name() -> None:
    model = create_model("mobilenetv2_050", classes=7, in_chans=1).eval()
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("mobilenetv3_smal_050", {}, "did you mean mobilenetv3_small_050"),
        ("digits_mobilenetv3", {"widht": 2}, "model.args.widht=2: no recipe may set that .* mean width"),
        ("mobilenetv2_100", {"num_classes": 4}, "model.args cannot hold num_classes: the data decides it, or model.classes"),
        ("digits_mobilenetv3", {"width": 100}, "width must lie in"),
    ],
)
def test_impossible_models_are_refused(name: str, args: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        create_model(name, classes=10, in_chans=1, args=args)


def test_demo_net_has_no_pretrained_weights() -> None:
    with pytest.raises(RecipeError, match="no pretrained weights"):
        create_model("digits_mobilenetv3", classes=10, in_chans=1, pretrained=True)
