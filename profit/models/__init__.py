"""Networks by name: the demo net, else any model of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from profit.errors import RecipeError

__all__ = ["OWN_MODELS", "create_model"]

OWN_MODELS = ("digits_mobilenetv3",)
# What a recipe says elsewhere.
_DECIDED = {
    "num_classes": "the data decides it, or model.classes",
    "in_chans": "data.in_chans decides it",
    "pretrained": "model.pretrained decides it",
}


def create_model(
    name: str,
    *,
    classes: int,
    in_chans: int,
    pretrained: bool = False,
    args: Mapping[str, Any] | None = None,
    setting: str = "model.name",
) -> nn.Module:
    """A freshly initialised (or timm-pretrained) full-precision network.

    Args:
        name: `digits_mobilenetv3` or a timm model name.
        classes: number of outputs.
        in_chans: channels of the image.
        pretrained: load timm's weights (downloads them on first use).
        args: further keyword arguments of the model.
        setting: where the name stands in the recipe, for messages.

    Raises:
        RecipeError: unknown name (with the nearest known ones) or arguments the model does not take.
    """
    extra = dict(args or {})
    for key, source in _DECIDED.items():
        if key in extra:
            raise RecipeError(f"model.args cannot hold {key}: {source}")
    try:
        if name == "digits_mobilenetv3":
            from profit.models.digits_mobilenetv3 import DigitsMobileNetV3

            if pretrained:
                raise RecipeError("model.pretrained: there are no pretrained weights for digits_mobilenetv3")
            return DigitsMobileNetV3(num_classes=classes, in_chans=in_chans, **extra)
        import timm

        if not timm.is_model(name):
            from difflib import get_close_matches

            near = get_close_matches(name, [*OWN_MODELS, *timm.list_models()], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RecipeError(f"{setting}: {name!r} is neither one of ours nor a timm model{hint}")
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_chans, **extra)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.args do not fit {name}: {' '.join(str(error).split())}") from error
