"""`profit train RECIPE --dry-run`: every phase with its learning rates, what it freezes and how long it would take."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from profit.errors import MissingDataError, RecipeError
from profit.freezing import ProgressiveFreezer
from profit.models import OWN_MODELS
from profit.optim import is_weighted_layer
from profit.report.results import read_results
from profit.schedule import Phase
from profit.train.checkpoint import load_checkpoint
from profit.train.loop import Objective, evaluate, train_epoch
from profit.train.network import Architecture, build_network
from profit.train.preflight import check_folder
from profit.train.recipe import Recipe
from profit.train.runs import CHECKPOINTS, RESULTS, device_for, newest_checkpoint, threads
from profit.train.teacher import load_teacher
from profit.train.trainer import Trainer

STEPS = 3  # measured per kind of phase, after one to warm up
ENOUGH_S = 20.0  # a kind of phase is not measured for longer than this


def dry_run(recipe: Recipe, folder: Path, images: int | None = None, throughput: float | None = None) -> str:
    """The plan of a recipe as text; nothing is written and nothing downloaded.

    Args:
        folder: the run folder; if it holds scores already, the frozen layers are named.
        images, throughput: training images per epoch and images per second, for an estimate without the data.

    Raises:
        ProfitError: what would stop the run as well, except data that are not there.
    """
    try:
        plan = replace(_untrained(recipe), teacher=replace(recipe.teacher, source=None))
        with threads(recipe.run.threads), tempfile.TemporaryDirectory() as nowhere:
            trainer = Trainer(plan, Path(nowhere), resume=False, quiet=True)
            check_folder(recipe, trainer.model, folder)
            trainer.teacher = load_teacher(recipe.teacher.source, trainer.architecture, trainer.device, pretrained=False)
            model = trainer.model
            seconds, how = _measured(trainer, recipe) if throughput is None else _computed(recipe, images, throughput)
    except MissingDataError as error:
        model = _model_without_data(recipe)
        seconds, how = _computed(recipe, images, throughput)
        if seconds is None:
            how = f"time: not estimated, because {error}; with --images and --throughput it is"
    return "\n".join([*_table(recipe, model, seconds), *_frozen_names(recipe, model, folder), how])


def _model_without_data(recipe: Recipe) -> nn.Module | None:
    """The converted network as far as the recipe alone tells it."""
    classes = recipe.model.classes or recipe.data.classes
    if classes is None:
        return None
    size = recipe.data.image_size
    architecture = Architecture(recipe.model.name, classes, recipe.data.in_chans, size, dict(recipe.model.args))
    return build_network(_untrained(recipe), architecture, device_for(recipe))


def _untrained(recipe: Recipe) -> Recipe:
    """Nothing is downloaded. Raises RecipeError where there is nothing to download."""
    import timm

    name = recipe.model.name
    known = name in OWN_MODELS or timm.is_model(name)
    if recipe.model.pretrained and known and (name in OWN_MODELS or not timm.models.is_model_pretrained(name)):
        raise RecipeError(f"model.pretrained: there are no pretrained weights for {name}")
    return replace(recipe, model=replace(recipe.model, pretrained=False))


def _ranked(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "ranked", False)]


def _table(recipe: Recipe, model: nn.Module | None, seconds: list[float] | None) -> list[str]:
    phases, columns = recipe.schedule.phases, {}
    if model is not None:
        ranked, weighted = len(_ranked(model)), sum(map(is_weighted_layer, model.modules()))
        columns["layers frozen"] = [f"{_number_frozen(phase, ranked, weighted, recipe.schedule.stages)}" for phase in phases]
    if seconds is not None:
        columns["time"] = [_duration(s) for s in seconds]
    lines = recipe.schedule.table(columns).splitlines()
    if seconds is not None:
        lines.append(f"estimated time: {_duration(sum(seconds))}")
    return lines


def _number_frozen(phase: Phase, ranked: int, weighted: int, stages: int) -> str:
    if not phase.train_weights:
        return f"{weighted} of {weighted}"
    return "0" if not phase.stage else f"{ranked * phase.stage // stages} of {ranked}"


def _frozen_names(recipe: Recipe, model: nn.Module | None, folder: Path) -> list[str]:
    """The names of what each stage freezes, most unstable first, once a run has scores."""
    stages = [phase for phase in recipe.schedule.phases if phase.stage]
    scores = _scores(folder)
    if not stages or model is None:
        return []
    if scores is None:
        return ["which layers: known once AIWQ has been sampled (run --dry-run on the run folder then)"]
    freezer = ProgressiveFreezer(model, scores, stages=recipe.schedule.stages)
    return [f"{phase.name} freezes {', '.join(freezer.frozen_names(phase.stage or 0))}" for phase in stages]


def _scores(folder: Path) -> dict[str, float] | None:
    name = newest_checkpoint(folder)[0] if (folder / CHECKPOINTS).is_dir() else None
    if name:
        aiwq = load_checkpoint(folder / CHECKPOINTS / name)["aiwq"]
    elif (folder / RESULTS).is_file():
        aiwq = read_results(folder)["aiwq"]
    else:
        return None
    return aiwq["scores"] if aiwq else None


def _computed(recipe: Recipe, images: int | None, throughput: float | None) -> tuple[list[float] | None, str]:
    if images is None or throughput is None:
        return None, "time: not estimated; it takes --images and --throughput together, or the data"
    seconds = [phase.epochs * images / throughput for phase in recipe.schedule.phases]
    return seconds, (
        f"time: computed, not measured: {images} images per epoch at the given {throughput:g} images/s in every phase, "
        "without testing"
    )


def _measured(trainer: Trainer, recipe: Recipe) -> tuple[list[float], str]:
    """Seconds per phase from a few steps of each kind of phase on this machine."""
    accumulate, every = recipe.optim.accumulate, recipe.run.eval_every
    steps = len(trainer.data.train) // accumulate
    batches = list(islice(trainer.data.train, accumulate * min(STEPS, max(steps, 1))))
    start = time.perf_counter()
    evaluate(trainer.model, _Few(list(islice(trainer.data.test, 1))))
    test_s = (time.perf_counter() - start) * len(trainer.data.test) * (2 if recipe.ema.enabled else 1)
    trainer.aiwq = {"scores": {name: float(index) for index, name in enumerate(_ranked(trainer.model))}}
    known: dict[Any, float] = {}
    seconds, calibrated = [], False
    for phase in trainer.schedule.phases:
        kind = (phase.kind, phase.weight_bits is None, phase.act_bits is None, phase.frozen_fraction, phase.train_intervals)
        if kind not in known:
            # the first phase that is measured with quantized activations may not be the one that calibrates
            trainer._enter_phase(replace(phase, calibrate=phase.act_bits is not None and not calibrated), fresh=True)
            calibrated = calibrated or phase.act_bits is not None
            known[kind] = _step_seconds(trainer, recipe, phase, batches)
            if trainer.monitor is not None:
                trainer.monitor.remove()
                trainer.monitor = None
        tests = phase.epochs // every if every else 1
        seconds.append(phase.epochs * steps * known[kind] + tests * test_s)
    return seconds, (
        f"time: measured here ({trainer.run_info['device']}, {trainer.run_info['threads']} threads, 1 process) as the fastest "
        f"of {STEPS} steps in each of {len(known)} kinds of phases, with the images already loaded: loading them must keep up"
    )


def _step_seconds(trainer: Trainer, recipe: Recipe, phase: Phase, batches: list[tuple[Tensor, Tensor]]) -> float:
    """The fastest of a few optimizer steps in the phase that was entered, in seconds."""
    objective = Objective(trainer.teacher, recipe.teacher.weight, recipe.optim.label_smoothing)
    accumulate, times, begun = recipe.optim.accumulate, [], time.perf_counter()
    for attempt in range(STEPS + 1):
        first = attempt % (len(batches) // accumulate) * accumulate
        stats = train_epoch(
            trainer.trained, _Few(batches[first : first + accumulate]), objective, trainer.optimizer,
            lr_at=lambda progress: 0.0, ema=trainer.ema, monitor=trainer.monitor, accumulate=accumulate, amp=trainer.amp,
            where=f"phase {phase.name}",
        )  # fmt: skip
        if attempt or not times:
            times.append(stats.wall_s)
        if time.perf_counter() - begun > ENOUGH_S:
            break
    return min(times)


class _Few:
    """Some batches as a loader."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def set_epoch(self, epoch: int) -> None: ...

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"
