"""A MobileNetV3-style network for 16-pixel images, small enough to train on one CPU core.

The blocks are timm's; only their arrangement is ours. The stem keeps the full resolution and the maps end at 4 x 4, so
that every 5 x 5 depthwise convolution still sees image and not only padding.
"""

from __future__ import annotations

from functools import partial

from timm.layers import SelectAdaptivePool2d, create_conv2d
from timm.models._efficientnet_blocks import DepthwiseSeparableConv, InvertedResidual, SqueezeExcite
from timm.models._efficientnet_builder import efficientnet_init_weights
from torch import Tensor, nn

#: kernel, stride, expansion, output channels, squeeze-and-excite, activation; one row per inverted residual block
BLOCKS = (
    (3, 2, 3.0, 16, False, nn.ReLU),
    (3, 1, 3.0, 16, False, nn.ReLU),
    (5, 2, 3.0, 24, True, nn.Hardswish),
    (5, 1, 3.0, 24, True, nn.Hardswish),
)


class DigitsMobileNetV3(nn.Module):
    """Stem, one depthwise-separable block, four inverted residuals (see `BLOCKS`), and MobileNetV3's head.

    Input `[N, in_chans, 16, 16]` (any size from 8 px up works), output logits `[N, num_classes]`.

    Args:
        num_classes: number of classes.
        in_chans: channels of the image.
        width: multiplier on the number of channels of every block.
        head: features between the pooling and the classifier.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, width: float = 1.0, head: int = 64, drop_rate: float = 0.0
    ) -> None:
        super().__init__()
        if not 0.25 <= width <= 8:
            raise ValueError(f"width must lie in 0.25..8, got {width}")

        def scaled(channels: int) -> int:
            return max(4, int(channels * width / 4 + 0.5) * 4)

        # timm sizes the squeeze from the expanded channels; a quarter of the block's own input is MobileNetV3's habit
        squeeze = partial(SqueezeExcite, rd_ratio=0.25 / 3.0, gate_layer=nn.Hardsigmoid, force_act_layer=nn.ReLU,
                          rd_round_fn=lambda channels: max(4, int(channels / 4 + 0.5) * 4))
        channels = scaled(12)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, scaled(72)
        self.conv_stem = create_conv2d(in_chans, channels, 3, stride=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.act1 = nn.Hardswish()
        blocks: list[nn.Module] = [DepthwiseSeparableConv(channels, channels, dw_kernel_size=3, act_layer=nn.ReLU)]
        for kernel, stride, expansion, out, excite, activation in BLOCKS:
            blocks.append(
                InvertedResidual(
                    channels,
                    scaled(out),
                    dw_kernel_size=kernel,
                    stride=stride,
                    exp_ratio=expansion,
                    act_layer=activation,
                    se_layer=squeeze if excite else None,
                )
            )
            channels = scaled(out)
        self.blocks = nn.Sequential(*blocks)
        self.conv_last = create_conv2d(channels, self.num_features, 1)
        self.bn2 = nn.BatchNorm2d(self.num_features)
        self.act2 = nn.Hardswish()
        self.global_pool = SelectAdaptivePool2d(pool_type="avg")
        self.conv_head = create_conv2d(self.num_features, head, 1, bias=True)
        self.act_head = nn.Hardswish()
        self.flatten = nn.Flatten(1)
        self.dropout = nn.Dropout(drop_rate)
        self.classifier = nn.Linear(head, num_classes)
        efficientnet_init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = self.act2(self.bn2(self.conv_last(x)))
        x = self.act_head(self.conv_head(self.global_pool(x)))
        return self.classifier(self.dropout(self.flatten(x)))
