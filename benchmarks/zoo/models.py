"""The models of the zoo, and what is found about one of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from profit import DuQConfig

BATCH, PIXELS = 4, 64
FULL = DuQConfig(weight_bits=None, act_bits=None, padding="zero")

TIMM = """
mobilenetv1_100 mobilenetv1_125 mobilenetv2_050 mobilenetv2_100 mobilenetv2_140
mobilenetv3_small_050 mobilenetv3_small_100 mobilenetv3_large_100 mobilenetv3_rw
tf_mobilenetv3_small_100 tf_mobilenetv3_large_100 tf_mobilenetv3_small_minimal_100
mobilenetv4_conv_small mobilenetv4_conv_medium mobilenetv4_conv_aa_medium mobilenetv4_hybrid_medium mobilenet_edgetpu_100
mnasnet_050 mnasnet_100 mnasnet_small semnasnet_075 semnasnet_100 spnasnet_100
efficientnet_b0 efficientnet_b0_gn efficientnet_es efficientnet_lite0 efficientnet_cc_b0_4e
tf_efficientnet_b0 tf_efficientnet_lite0 tf_efficientnetv2_b0
lcnet_100 lcnetv2_small ghostnet_100 ghostnetv2_100 fbnetc_100 fbnetv3_b hardcorenas_a mixnet_s tf_mixnet_s tinynet_e
regnetx_002 regnety_002 regnetz_b16 resnet18 resnet18d resnet50 eca_resnet33ts nf_regnet_b0
rexnet_100 starnet_s1 repvgg_a0 mobilevit_xxs densenet121
""".split()
TORCHVISION = """
mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 mnasnet1_0 efficientnet_b0 regnet_x_400mf regnet_y_400mf
resnet18 resnet50 shufflenet_v2_x0_5 shufflenet_v2_x1_0 squeezenet1_1 googlenet inception_v3
""".split()
MODELS = (*(f"timm/{name}" for name in TIMM), *(f"torchvision/{name}" for name in TORCHVISION))
# What the refusals say to do, as patterns to skip.
REMEDIES = {
    "timm/eca_resnet33ts": ("*.attn.conv",),
    "torchvision/googlenet": ("aux1.*", "aux2.*"),
    "torchvision/inception_v3": ("AuxLogits.*",),
}
LARGER = {"torchvision/inception_v3": 299, "timm/mobilenetv4_hybrid_medium": 128}


@dataclass
class Row:
    """What was found for one model. `kinds` are (raw, unsigned, offset, signed); errors are relative L2 norms; `checks`
    maps the name of a check to "" where it passed and to what went wrong where it did not."""

    model: str
    refused: str = ""
    remedy: tuple[str, ...] = ()
    layers: int = 0
    kinds: tuple[int, ...] = ()
    ranked: int = 0
    fused: int = 0
    full_precision_error: float | None = None
    eight_bit_error: float | None = None
    noise_error: float | None = None
    worst_layer: tuple[str, float] | None = None
    checks: dict[str, str] = field(default_factory=dict)
    convert_s: float = 0.0
    wall_s: float = 0.0

    @property
    def converted(self) -> bool:
        return self.layers > 0

    @property
    def failed(self) -> list[str]:
        return [name for name, problem in self.checks.items() if problem]


def build(model: str) -> nn.Module:
    """`timm/NAME` or `torchvision/NAME` with random weights."""
    library, _, name = model.partition("/")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torchvision's word on the initialisation of GoogLeNet
        if library == "timm":
            import timm

            return timm.create_model(name, pretrained=False)
        import torchvision

        return torchvision.models.get_model(name, weights=None)


def images(count: int, pixels: int, seed: int) -> Tensor:
    """Smooth shapes with some noise, `[count, 3, pixels, pixels]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(pixels, pixels), mode="bicubic", align_corners=False)
    return smooth + 0.2 * torch.randn(count, 3, pixels, pixels, generator=generator)


@torch.no_grad()
def settle(model: nn.Module, x: Tensor) -> None:
    """BatchNorm statistics of `x`, then eval mode: a random network with unit statistics would blow up or die out."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def logits(output: Any) -> Tensor:
    """The output tensor; of GoogLeNet and Inception in training, the main one."""
    return output if isinstance(output, Tensor) else output[0]


def config(bits: int | None, remedy: Sequence[str]) -> DuQConfig:
    overrides = {pattern: {"skip": True} for pattern in remedy}
    return DuQConfig(weight_bits=bits, act_bits=bits, padding="zero", overrides=overrides)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
