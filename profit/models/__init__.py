"""Networks by name: the demo net, else any model of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from profit.allowed import OWN_MODELS, model_problem
from profit.errors import RecipeError

__all__ = ["OWN_MODELS", "create_model"]


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
        args: further keyword arguments of the model, of those that `profit.allowed` lists.
        setting: where the name stands in the recipe, for messages.

    Raises:
        RecipeError: unknown name (with the nearest known ones) or arguments the model does not take, or may not be given.
    """
    extra = dict(args or {})
    wrong = model_problem(name, extra, setting)
    if wrong:
        raise RecipeError(wrong)
    try:
        if name == "digits_mobilenetv3":
            from profit.models.digits_mobilenetv3 import DigitsMobileNetV3

            if pretrained:
                raise RecipeError("model.pretrained: there are no pretrained weights for digits_mobilenetv3")
            return DigitsMobileNetV3(num_classes=classes, in_chans=in_chans, **extra)
        import timm

        tagged = "." in name  # a tag names the pretrained weights
        if not timm.is_model(name) or (tagged and name not in timm.list_pretrained()):
            from difflib import get_close_matches

            near = get_close_matches(name, timm.list_pretrained() if tagged else [*OWN_MODELS, *timm.list_models()], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise RecipeError(f"{setting}: {name!r} is neither one of ours nor a timm model{hint}")
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, in_chans=in_chans, **extra)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"model.args do not fit {name}: {' '.join(str(error).split())}") from error
