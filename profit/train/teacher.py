"""Teachers: the network itself before quantization, an earlier run, or a pretrained timm model."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from profit.allowed import teacher_name_problem, teacher_problem
from profit.errors import CheckpointError, RecipeError
from profit.models import create_model
from profit.quantize import set_bits
from profit.schedule import Phase
from profit.train.network import Architecture, load_network, load_weights, read_weights, save_network


def load_teacher(
    source: str | None, architecture: Architecture, device: torch.device, pretrained: bool = True
) -> nn.Module | None:
    """The teacher a recipe names, in eval mode and without gradients; None for None and for `self`.

    Args:
        pretrained: with the weights that timm or torchvision has for it; without, only its cost is that of the teacher.

    Raises:
        RecipeError: not a file, not a timm or torchvision model, weights that cannot be had, or another number of classes or
            channels than the student's.
        CheckpointError: an unusable file.
    """
    if source in (None, "self"):
        return None
    wrong = teacher_problem(source)
    if wrong:
        raise RecipeError(wrong)
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
        teacher = _pretrained(source, architecture, pretrained)
    return _settled(teacher.to(device))


def _pretrained(source: str, architecture: Architecture, pretrained: bool) -> nn.Module:
    """A network of torchvision (`torchvision/NAME`) or timm, with the classifier its weights were trained with."""
    library, _, name = source.rpartition("/")
    wrong = teacher_name_problem(source)
    if wrong:
        raise RecipeError(wrong)
    try:
        if library == "torchvision":
            from torchvision import models
            from torchvision.models import get_model

            # networks for other tasks fetch the weights of their backbone even where none are asked for
            if name not in models.list_models(module=models):
                raise ValueError("torchvision has no network of this name for classification")
            teacher = get_model(name, weights="DEFAULT" if pretrained else None)
            classes = 1000
        else:
            import timm

            if not timm.is_model(source) or ("." in source and source not in timm.list_pretrained()):
                # the message with the nearest names is that of the student's model
                create_model(
                    source, classes=architecture.classes, in_chans=architecture.in_chans, setting="teacher.source"
                )
            teacher = timm.create_model(source, pretrained=pretrained)
            classes = teacher.num_classes
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        if isinstance(error, RecipeError):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"teacher.source: the weights of {source} cannot be had: {reason}") from error
    if (classes, 3) != (architecture.classes, architecture.in_chans):
        raise RecipeError(
            f"teacher.source: {source} has {classes} classes and 3 input channels, "
            f"the student {architecture.classes} and {architecture.in_chans}"
        )
    return teacher


def has_own_teacher(phase: Phase) -> bool:
    """Whether the teacher `self` serves in a phase: from the first one that quantizes."""
    return not phase.act_bits == phase.weight_bits is None


def own_teacher(
    model: nn.Module, architecture: Architecture, path: Path, *, stored: bool, write: bool = True
) -> nn.Module:
    """A full-precision copy of the student as it is now, with the weights in `path` if they are `stored` there; if not, `write`
    stores them.

    Raises:
        CheckpointError: `path` is missing, damaged, or of another network. ProfitError: it cannot be written.
    """
    teacher = copy.deepcopy(model)
    set_bits(teacher, weight_bits=None, act_bits=None)
    if stored:
        weights = read_weights(path)
        if weights.architecture is None:
            raise CheckpointError(f"{path} is not what a run wrote: it does not tell which network it is for")
        load_weights(teacher, weights.state, path)
    elif write:
        save_network(path, teacher, architecture, {})
    return _settled(teacher)


def _settled(teacher: nn.Module) -> nn.Module:
    return teacher.eval().requires_grad_(False)
