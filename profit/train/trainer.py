"""The trainer: every phase of a recipe, one after the other, with checkpoints that carry everything.

Read `Trainer.run`, then `_run_phase`, then `_enter_phase`: that is PROFIT's training procedure (PROFIT, section 4).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from profit.aiwq import AIWQMonitor
from profit.blocks import unfuse_
from profit.bn import sync_batchnorm
from profit.calibrate import calibrate_
from profit.data import create_data
from profit.decay import aiwq_decay_for, ema_decay_for
from profit.distributed import agree, average_buffers_, from_first, rank, sum_over_ranks, world_size
from profit.errors import TrainingError
from profit.files import write_atomic
from profit.freezing import ProgressiveFreezer, freeze_all, release_all
from profit.nn.baselines import pact_penalty
from profit.optim import param_groups, quantizer_parameters, quantizers
from profit.quantize import set_bits
from profit.report.results import read_finished
from profit.schedule import Phase
from profit.train import results as reporting
from profit.train.checkpoint import load_checkpoint, prune, save_checkpoint, seed_everything
from profit.train.ema import ModelEma
from profit.train.loop import Objective, evaluate, train_epoch
from profit.train.network import architecture_for, build_network, load_weights, network_state, save_network
from profit.train.origin import begin_run, check_kinds, teacher_digest
from profit.train.preflight import check_folder, check_memory, check_stages, check_steps
from profit.train.processes import distributed_model, process_group
from profit.train.progress import NoProgress, Progress, caught_warnings
from profit.train.recipe import Recipe
from profit.train.runs import CHECKPOINTS, MODEL, RESULTS, TEACHER, device_for, locked, threads
from profit.train.sharding import epoch_seed, shard
from profit.train.snapshot import restore, restore_phase, snapshot
from profit.train.teacher import has_own_teacher, load_teacher, own_teacher


def train(
    recipe: Recipe, out_dir: str | Path, resume: bool = False, quiet: bool = False, accept_changed: Collection[str] = ()
) -> dict[str, Any]:
    """Train a recipe into a run folder (its files: `profit.train.runs`) and return what results.json holds.

    Args:
        recipe: see `load_recipe`.
        out_dir: a folder that does not exist or is empty, or the folder of this very run with `resume`.
        resume: carry on an unfinished run; on the CPU the final weights are bit-identical to those of a run that was
            never interrupted. A finished run returns its results.
        quiet: plain lines instead of progress bars.
        accept_changed: which of "recipe", "teacher" and "data" may differ from what the run was begun with (`resume`); without,
            a difference is an error that names it.

    Under torchrun every process calls this with the same arguments; the run folder must be on a file system that all see.

    Raises:
        ProfitError: one of its subclasses, with one line that says what is wrong.
    """
    with threads(recipe.run.threads), process_group(recipe.run.timeout_s):
        check_kinds(accept_changed, resume)
        return Trainer(recipe, Path(out_dir), resume, quiet, accept_changed).run()


class Trainer:
    """One run. What changes while it trains, and is stored in a checkpoint, is set in `__init__` below the line."""

    def __init__(
        self, recipe: Recipe, folder: Path, resume: bool, quiet: bool, accept_changed: Collection[str] = ()
    ) -> None:
        self.recipe, self.folder, self.resume, self.quiet = recipe, folder, resume, quiet
        self.accept_changed = accept_changed
        self.schedule = recipe.schedule
        self.rank, self.world = rank(), world_size()
        self.device = device_for(recipe)
        self.amp = torch.bfloat16 if recipe.run.amp == "bf16" else None
        seed_everything(recipe.run.seed)
        self.data = shard(
            create_data(recipe.data, seed=recipe.run.seed, device=self.device), batch_size=recipe.data.batch_size,
            accumulate=recipe.optim.accumulate, rank=self.rank, world=self.world, seed=recipe.run.seed,
        )  # fmt: skip
        self.architecture = architecture_for(recipe, self.data)
        with caught_warnings() as self.warnings:
            self.model = build_network(recipe, self.architecture, self.device)
        if recipe.run.channels_last:
            self.model.to(memory_format=torch.channels_last)
        if recipe.run.sync_bn and self.world > 1:
            unfuse_(self.model)  # a convolution in whose place BatchNorm is applied sees this process's batch alone
            self.model = sync_batchnorm(self.model)
        self.trained = self.model  # what a training step calls: the model, compiled and wrapped as the phase needs it
        check_stages(recipe, self.model)
        check_steps(recipe, len(self.data.train))
        check_memory(recipe, self.model, self.architecture, self.data.train_images, self.world)
        self.teacher = load_teacher(recipe.teacher.source, self.architecture, self.device)
        # ---
        self.phase_index = 0  # the phase to carry on with,
        self.epoch = 0  # and the epochs of it that are done
        self.optimizer: torch.optim.Optimizer | None = None
        self.ema: ModelEma | None = None
        self.monitor: AIWQMonitor | None = None
        self.aiwq: dict[str, Any] | None = None
        self.frozen_stage: dict[str, int] = {}
        self.history: list[dict[str, Any]] = []  # of the phase that is running
        self.phases: list[dict[str, Any]] = []  # of the phases that are over
        self.best: dict[str, float] = {}
        self.accuracy_fp: float | None = None
        self.wall_s = self.phase_wall_s = 0.0
        self.images_per_s = 0.0
        self.unreadable: set[str] = set()
        self.run_info = reporting.describe_run(recipe, self.device)
        self.origin: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        """All phases that are left, then the final files. Process 0 alone writes to the folder; the others do as it found."""
        from_first(lambda: check_folder(self.recipe, self.model, self.folder))
        with ExitStack() as stack:
            from_first(lambda: stack.enter_context(locked(self.folder)))
            return self._run()

    def _run(self) -> dict[str, Any]:
        finished, name, lines, self.origin = from_first(
            lambda: begin_run(self.folder, self.recipe, self.data, self.resume, self.accept_changed)
        )
        if finished:
            return read_finished(self.folder)
        state = load_checkpoint(self.folder / CHECKPOINTS / name) if name else None
        if state is not None:
            restore(self, state)
        with self._progress() as self.progress:
            sections = {
                "run": self.run_info,
                "model": reporting.describe_model(self.model, self.architecture),
                "data": reporting.describe_data(self.recipe, self.data),
            }
            for line in (reporting.headline(sections, self.schedule, self._global_epoch()), *self.warnings, *lines):
                self.progress.line(line)
            if state is None and self.schedule.phases[0].name != "fp":
                _, self.accuracy_fp = evaluate(self.model, self.data.test, self.amp)
            for phase in self.schedule.phases[self.phase_index :]:
                self._run_phase(phase, state)
                state = None
            return self._finish()

    def _run_phase(self, phase: Phase, state: dict[str, Any] | None) -> None:
        """Train one phase, from the epoch where a checkpoint stands if there is a `state`."""
        under_way = self.epoch > 0
        try:
            with caught_warnings() as found:
                self._enter_phase(phase, fresh=not under_way)
        except ValueError as error:  # what this network does not offer: nothing to rank, nothing to train
            raise TrainingError(f"phase {phase.name}: {error}") from error
        for line in found:
            self.progress.line(line)
        if state is not None and under_way:
            restore_phase(self, state)
        label = f"[{self.phase_index + 1}/{len(self.schedule)}]"
        steps = len(self.data.train)
        self.progress.begin_phase(phase, label, phase.epochs * steps, self.epoch * steps)
        penalty = None
        if self.recipe.quant.quantizer == "pact" and phase.train_intervals and phase.act_bits is not None:

            def penalty() -> Tensor:
                return phase.weight_decay * pact_penalty(self.model)

        objective = Objective(self.teacher, self.recipe.teacher.weight, self.recipe.optim.label_smoothing, penalty)
        for _ in range(self.epoch, phase.epochs):
            started = time.perf_counter()
            seed_everything(epoch_seed(self.recipe.run.seed, self._global_epoch(), self.rank))
            self.data.train.set_epoch(self._global_epoch())
            stats = train_epoch(
                self.trained,
                self.data.train,
                objective,
                self.optimizer,
                lr_at=lambda progress: phase.lr_at(self.epoch + progress),
                ema=self.ema,
                monitor=self.monitor,
                clip_grad=self.recipe.optim.clip_grad,
                accumulate=self.recipe.optim.accumulate,
                amp=self.amp,
                on_step=self.progress.step,
                where=f"phase {phase.name}, epoch {self.epoch + 1}",
            )
            average_buffers_(self.model, *([self.ema.module] if self.ema else []))
            loss = float(sum_over_ranks(torch.tensor(stats.loss, dtype=torch.float64))) / self.world
            images_per_s = stats.images_per_s * self.world
            self.epoch += 1
            last = self.epoch == phase.epochs
            every = self.recipe.run.eval_every
            self._record_epoch(phase, loss, test=last or bool(every and self.epoch % every == 0))
            self.images_per_s += (images_per_s - self.images_per_s) / self.epoch
            self.progress.end_epoch(phase, label, self.history[-1], images_per_s, self._global_epoch())
            self._tell_of_unreadable()
            spent = time.perf_counter() - started
            self.phase_wall_s, self.wall_s = self.phase_wall_s + spent, self.wall_s + spent
            if last:
                self._leave_phase(phase, label)
            self._save_checkpoint()

    def _enter_phase(self, phase: Phase, fresh: bool) -> None:
        """Bit widths, what is frozen, a new optimizer, a new average of weights, and the AIWQ hooks."""
        self.trained = self.model  # the wrapper of the phase before goes, and its hooks with it
        release_all(self.model)
        self._keep_own_teacher(phase)
        set_bits(self.model, weight_bits=phase.weight_bits, act_bits=phase.act_bits)
        if phase.calibrate and fresh:
            settings = self.recipe.calibration
            own = range(self.rank, settings.batches, self.world) if settings.batches > 0 else ()
            calibrate_(
                self.model, islice(self.data.calibration, len(own)), batches=max(len(own), 1) if settings.batches > 0 else 0,
                percentile=settings.percentile, mode=settings.mode,
            )  # fmt: skip
        self.frozen = self._freeze(phase)
        self.trained = self._wrapped(phase)
        groups = param_groups(self.model, phase.lr, phase.weight_decay, phase.interval_lr_mult)
        optim = self.recipe.optim
        self.optimizer = torch.optim.SGD(
            groups, lr=phase.lr, momentum=optim.momentum, nesterov=optim.nesterov and optim.momentum > 0, fused=True
        )
        steps = phase.epochs * (len(self.data.train) // optim.accumulate)
        if self.recipe.ema.enabled:
            decay = self.recipe.ema.decay
            self.ema = ModelEma(self.model, ema_decay_for(max(steps, 1)) if decay is None else decay)
        if phase.kind == "sample":
            settings = self.recipe.aiwq
            decay = aiwq_decay_for(max(steps // settings.every, 1)) if settings.decay is None else settings.decay
            pooled = settings.mode == "corrected" and self.world * optim.accumulate > 1
            self.monitor = AIWQMonitor(self.model, settings.mode, settings.every, decay, pooled)

    def _wrapped(self, phase: Phase) -> nn.Module:
        """The model as the steps of this phase call it."""
        # an interval without a bit width gets no gradient, which DistributedDataParallel would wait for
        for quantizer in quantizers(self.model):
            if quantizer.bits is None:
                quantizer.requires_grad_(False)
        run, model = self.recipe.run, self.model
        if run.compile and phase.kind != "sample":
            torch.compiler.reset()  # compiled code does not look again for bit widths and hooks
            model = torch.compile(model)
        unused = run.find_unused_parameters or self.recipe.quant.quantizer != "duq"
        return distributed_model(model, self.device, unused)

    def _freeze(self, phase: Phase) -> list[str]:
        """Stop training what this phase does not train; the names of the layers whose weights are frozen."""
        if not phase.train_weights:
            return freeze_all(self.model, intervals=not phase.train_intervals)
        if not phase.train_intervals:
            for parameter in quantizer_parameters(self.model):
                parameter.requires_grad_(False)
        if phase.stage is None:
            return []
        if self.aiwq is None:
            raise TrainingError("a freezing stage needs AIWQ scores: set schedule.sample_epochs to at least 1")
        scores, stages, what = self.aiwq["scores"], self.schedule.stages, self.schedule.freeze
        frozen = ProgressiveFreezer(self.model, scores, stages=stages, freeze=what).apply(phase.stage)
        for name in frozen:
            self.frozen_stage.setdefault(name, phase.stage)
        return frozen

    def _keep_own_teacher(self, phase: Phase) -> None:
        """When quantization begins, the network as it is becomes its own teacher (or the stored copy is read again)."""
        if self.recipe.teacher.source != "self" or self.teacher is not None or not has_own_teacher(phase):
            return
        kept, write = self.origin["teacher"], self.rank == 0
        stored = kept["sha256"] is not None
        self.teacher = own_teacher(self.model, self.architecture, self.folder / TEACHER, stored=stored, write=write)
        if write:
            kept["sha256"] = teacher_digest("self", self.folder)

    def _record_epoch(self, phase: Phase, train_loss: float, test: bool) -> None:
        """Test the model and its average, keep the best of each, and add a row to the history."""
        row: dict[str, Any] = {
            "epoch": self.epoch, "lr": phase.lr_at(self.epoch - 1), "train_loss": train_loss,
            "test_loss": None, "accuracy": None, "accuracy_ema": None,
        }  # fmt: skip
        if test:
            row["test_loss"], row["accuracy"] = evaluate(self.model, self.data.test, self.amp)
            if not math.isfinite(row["test_loss"]):
                step = len(self.data.train) // self.recipe.optim.accumulate
                raise TrainingError(f"the weights became NaN in phase {phase.name}, epoch {self.epoch}, step {step}: "
                                    "try a lower learning rate or optim.clip_grad")  # fmt: skip
            self._keep_best("best", self.model, row["accuracy"], phase)
            if self.ema is not None:
                _, row["accuracy_ema"] = evaluate(self.ema.module, self.data.test, self.amp)
                self._keep_best("best_ema", self.ema.module, row["accuracy_ema"], phase)
        self.history.append(row)

    def _tell_of_unreadable(self) -> None:
        """A line for every image that was left out for the first time."""
        for file in self.data.unreadable():
            if file not in self.unreadable:
                self.unreadable.add(file)
                self.progress.line(f"warning: left out {file!r}, which cannot be read ({len(self.unreadable)} so far)")

    def _keep_best(self, name: str, model: nn.Module, accuracy: float, phase: Phase) -> None:
        key = f"{name} {phase.bits}"  # an accuracy at 8 bits must not stand in the way of the best at 4
        if accuracy > self.best.get(key, -1.0):
            self.best[key] = accuracy
            if self.rank:
                return
            note = {"accuracy": accuracy, "phase": phase.name, "epoch": self.epoch, "bits": phase.bits}
            save_checkpoint(self.folder / CHECKPOINTS / name, {**network_state(model, self.architecture), "note": note})

    def _leave_phase(self, phase: Phase, label: str) -> None:
        """Read the AIWQ scores, write results.json, and move on to the next phase."""
        if self.monitor is not None:
            self.aiwq = agree(reporting.aiwq_section(self.monitor))  # one ranking, to the last bit
            self.monitor.remove()
            self.monitor = None
            self.progress.scores(self.aiwq["scores"], self._global_epoch())
        if phase.name == "fp":
            self.accuracy_fp = self.history[-1]["accuracy"]
        row = reporting.phase_row(phase, self.frozen, self.history, self.phase_wall_s, self.images_per_s)
        self.phases.append(row)
        self.run_info["wall_s"] = round(self.wall_s, 2)
        self._write_results()
        self.progress.end_phase(label, row)
        if self.recipe.run.weights == "ema" and self.phase_index == len(self.schedule) - 1 and self.ema is not None:
            load_weights(self.model, self.ema.module.state_dict(), "the average of weights")
        self.phase_index, self.epoch, self.history = self.phase_index + 1, 0, []
        self.phase_wall_s = self.images_per_s = 0.0

    def _write_results(self) -> dict[str, Any]:
        content = reporting.assemble(
            recipe=self.recipe, run=self.run_info, model=self.model, architecture=self.architecture, data=self.data,
            phases=self.phases, aiwq=self.aiwq, frozen_stage=self.frozen_stage, accuracy_fp=self.accuracy_fp,
        )  # fmt: skip
        if self.rank == 0:
            write_atomic(self.folder / RESULTS, reporting.to_json(content), follow=False)
        return content

    def _finish(self) -> dict[str, Any]:
        """The last files; model.safetensors marks a finished run, whose report can be made at any time."""
        from profit.report import write_report

        last = self.schedule.phases[-1]
        set_bits(self.model, weight_bits=last.weight_bits, act_bits=last.act_bits)
        self.run_info["finished"] = True
        content = self._write_results()
        if self.rank:
            return content
        prune(self.folder / CHECKPOINTS, self.recipe.run.keep_checkpoints)  # the writing of the last may have been broken off
        save_network(self.folder / MODEL, self.model, self.architecture, content["final"])
        write_report(self.folder)  # after all that cannot be made again
        return content

    def _save_checkpoint(self) -> None:
        """Everything the next epoch depends on, then drop the oldest."""
        if self.rank:
            return
        folder = self.folder / CHECKPOINTS
        save_checkpoint(folder / f"epoch-{self._global_epoch():05d}", snapshot(self))
        prune(folder, self.recipe.run.keep_checkpoints)

    def _progress(self) -> Progress:
        if self.rank:
            return NoProgress()
        tensorboard, epoch = self.recipe.run.tensorboard, self._global_epoch()
        return Progress(self.folder, quiet=self.quiet, tensorboard=tensorboard, first_epoch=epoch)

    def _global_epoch(self) -> int:
        """Epochs of the whole run that are done."""
        return sum(phase.epochs for phase in self.schedule.phases[: self.phase_index]) + self.epoch
