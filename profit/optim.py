"""Parameter groups of the recipe: weights, quantizer intervals, and BatchNorm with biases.

Source: the published PROFIT training command: weight decay on convolution and linear weights only; interval parameters
at 1/100 of the learning rate without decay; BatchNorm and biases at the full rate without decay.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from .checks import check_module, check_number

_QUANTIZER_CHILDREN = ("input_quantizer", "weight_quantizer")


def is_weighted_layer(module: nn.Module) -> bool:
    """Whether `module` is a convolution or linear layer, quantized or not."""
    return isinstance(module, (_ConvNd, nn.Linear))


def quantizers(model: nn.Module) -> list[nn.Module]:
    """Every input and weight quantizer in `model`, each once."""
    found = {}
    for module in model.modules():
        for name in _QUANTIZER_CHILDREN:
            child = getattr(module, name, None)
            if isinstance(child, nn.Module):
                found[id(child)] = child
    return list(found.values())


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every parameter of every input and weight quantizer in `model`, each once."""
    return list({id(p): p for quantizer in quantizers(model) for p in quantizer.parameters()}.values())


def param_groups(
    model: nn.Module, lr: float, weight_decay: float, interval_lr_mult: float = 1e-2
) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: every parameter that requires a gradient, exactly once.

    Groups without a parameter are left out. A group's "lr_mult" is its learning rate relative to `lr`: a schedule sets
    ``group["lr"] = rate * group["lr_mult"]``. A parameter shared by several modules is in the first group that claims it,
    in the order below.

    Args:
        model: a converted or ordinary model.
        lr: base learning rate.
        weight_decay: of convolution and linear weights.
        interval_lr_mult: learning rate of quantizer parameters relative to `lr`.

    Returns:
        Dictionaries with "name" ("intervals", "weights" or "norm_bias"), "params", "lr", "weight_decay", "lr_mult".

    Raises:
        ValueError: a rate or decay that is negative or not finite, or a model in which nothing trains. TypeError: no model.
    """
    check_module(model)
    for name, value in (("lr", lr), ("weight_decay", weight_decay), ("interval_lr_mult", interval_lr_mult)):
        # a rate may be a tensor, which is what optimizers captured in a CUDA graph take
        check_number(value.item() if isinstance(value, Tensor) and value.numel() == 1 else value, name, 0)
    claims = {
        "intervals": quantizer_parameters(model),
        "weights": [module.weight for module in model.modules() if is_weighted_layer(module)],
        "norm_bias": list(model.parameters()),
    }
    multipliers = {"intervals": interval_lr_mult, "weights": 1.0, "norm_bias": 1.0}
    groups = []
    taken: set[int] = set()
    for name, candidates in claims.items():
        params = []
        for parameter in candidates:
            if parameter.requires_grad and id(parameter) not in taken:
                taken.add(id(parameter))
                params.append(parameter)
        if params:
            decay = weight_decay if name == "weights" else 0.0
            mult = multipliers[name]
            groups.append({"name": name, "params": params, "lr": lr * mult, "weight_decay": decay, "lr_mult": mult})
    if not groups:
        raise ValueError("no parameter requires a gradient: everything is frozen, there is nothing to train")
    return groups
