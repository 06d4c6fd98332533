"""Teachers: the network itself before quantization, an earlier run, or a pretrained timm model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from profit.errors import RecipeError
from profit.models import create_model
from profit.quantize import set_bits
from profit.train.network import Architecture, load_network, load_weights, read_weights, save_network


def load_teacher(source: str | None, architecture: Architecture, device: torch.device) -> nn.Module | None:
    """The teacher a recipe names, in eval mode and without gradients; None for None and for `self`.

    Raises:
        RecipeError: not a file, not a timm model, or another number of classes than the student's.
        CheckpointError: an unusable file.
    """
    if source in (None, "self"):
        return None
    if Path(source).exists():
        teacher, theirs = load_network(source)
        if (theirs.classes, theirs.in_chans) != (architecture.classes, architecture.in_chans):
            raise RecipeError(
                f"teacher.source: {source} has {theirs.classes} classes and {theirs.in_chans} input channels, "
                f"the student {architecture.classes} and {architecture.in_chans}"
            )
    elif source.endswith(".safetensors") or source.startswith((".", "/")):
        raise RecipeError(f"teacher.source: there is no file or folder {source}")
    else:
        _check_classes(source, architecture)
        teacher = create_model(
            source, classes=architecture.classes, in_chans=architecture.in_chans, pretrained=True, setting="teacher.source"
        )
    return _settled(teacher.to(device))


def _check_classes(source: str, architecture: Architecture) -> None:
    """timm gives a pretrained network of another number of classes a new, random head: no teacher."""
    import timm

    pretrained = timm.get_pretrained_cfg(source) if timm.is_model(source) else None
    if pretrained is not None and pretrained.num_classes != architecture.classes:
        raise RecipeError(
            f"teacher.source: the weights of {source} are for {pretrained.num_classes} classes, the student has "
            f"{architecture.classes}; train a teacher on these data and name its run folder"
        )


def own_teacher(model: nn.Module, architecture: Architecture, path: Path) -> nn.Module:
    """A full-precision copy of the student as it is now, stored in `path`; what is stored there already goes first."""
    teacher = copy.deepcopy(model)
    set_bits(teacher, weight_bits=None, act_bits=None)
    if path.is_file():
        load_weights(teacher, read_weights(path).state, path)
    else:
        save_network(path, teacher, architecture, {})
    return _settled(teacher)


def _settled(teacher: nn.Module) -> nn.Module:
    return teacher.eval().requires_grad_(False)
