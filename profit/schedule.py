"""The PROFIT recipe as data: which phase comes when, with which bits, trainable parts and learning rate.

Source: Park & Yoo, "PROFIT: A Novel Training Method for sub-4-bit MobileNet Models", ECCV 2020 (arXiv 2008.04693),
sections 4 and 5, and the constants of the published training command. The defaults are the 4-bit MobileNetV2 recipe on
ImageNet: 200 epochs of SGD (Nesterov 0.9, batch 256).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .checks import brief, check_flag, check_number, check_state, check_whole
from .config import MAX_BITS, MIN_BITS, check_choice

# A phase warms up over at most this share of its epochs; the published 3 of 15 epochs is exactly this share.
MAX_WARMUP_SHARE = 0.2
# A stage that freezes no further layer is pointless, and no mobile network has as many; a longer phase is a slip of the pen.
MAX_STAGES, MAX_EPOCHS = 1000, 10**6


@dataclass(frozen=True)
class Phase:
    """One phase of training: everything a training loop needs to know to run it.

    Attributes:
        name: "fp", "a8.bn", "a8.train", "a8.bn2", "w4.sample", "w4.stage0", "w4.final", ...
        kind: "train", "bn" (weights frozen) or "sample" (train while AIWQ is measured).
        epochs: length in epochs.
        weight_bits, act_bits: bit widths; None is full precision.
        stage: index of the freezing stage, None outside the stages.
        frozen_fraction: share of the ranked convolutions whose weights are frozen (1.0: every weight of the network).
        train_weights, train_intervals: whether any weight / any quantizer parameter trains.
        lr: base learning rate of weights, biases and BatchNorm.
        lr_schedule: "cosine" (after the warm-up) or "constant".
        warmup_epochs, warmup_factor: linear warm-up from `warmup_factor * lr`.
        min_lr_factor: the cosine ends at `min_lr_factor * lr`.
        calibrate: set the activation intervals from data before the phase starts.
        interval_lr_mult: learning rate of the quantizer parameters relative to `lr`.
        weight_decay: on convolution and linear weights only.
    """

    name: str
    kind: str
    epochs: int
    weight_bits: int | None
    act_bits: int | None
    stage: int | None
    frozen_fraction: float
    train_weights: bool
    train_intervals: bool
    lr: float
    lr_schedule: str
    warmup_epochs: float
    warmup_factor: float
    min_lr_factor: float
    calibrate: bool
    interval_lr_mult: float
    weight_decay: float

    @property
    def bits(self) -> str:
        """Bit widths as "W4A4"; 32 stands for full precision."""
        return f"W{self.weight_bits or 32}A{self.act_bits or 32}"

    def lr_at(self, progress_epochs: float) -> float:
        """Learning rate after `progress_epochs` (fractions allowed) of this phase; clamped to the phase's ends."""
        if self.lr_schedule == "constant":
            return self.lr
        t = min(max(progress_epochs, 0.0), float(self.epochs))
        if t < self.warmup_epochs:
            return self.lr * (self.warmup_factor + (1.0 - self.warmup_factor) * t / self.warmup_epochs)
        cosine_epochs = self.epochs - self.warmup_epochs
        phase = (t - self.warmup_epochs) / cosine_epochs if cosine_epochs > 0 else 1.0
        return self.lr * (self.min_lr_factor + (1.0 - self.min_lr_factor) * 0.5 * (1.0 + math.cos(math.pi * phase)))


@dataclass
class PhaseSchedule:
    """The whole recipe, and where a run stands in it.

    Iterating yields the phases from `position` on and moves `position` as each one is left, so a run that broke off
    carries on after `load_state_dict`; `phases` is the full tuple, whatever the position. Per bit width of `act_bits`,
    then of `weight_bits` (at the last activation width): BN phase, training, BN phase. A weight width listed in
    `profit_bits` replaces the training by AIWQ sampling and `stages` stages with the top 0, 1/stages, 2/stages, ... of
    the ranked convolutions frozen. The closing BN phase of the whole schedule is called "final" and trains BatchNorm and
    biases alone (with `final_train_intervals` the quantizer intervals too, as in all other BN phases). A phase of 0 epochs
    is left out.

    Args:
        fp_epochs: full-precision fine-tuning before any quantization.
        act_bits, weight_bits: descending bit widths (2..8); empty leaves that side in full precision.
        profit_bits: the widths of `weight_bits` trained with PROFIT.
        bn_epochs, train_epochs, sample_epochs, stages, stage_epochs, final_bn_epochs: lengths, see above.
        lr, fp_lr: base learning rates; `fp_lr` None means `lr`.
        warmup_epochs: of each train phase, at most a fifth of it. BN phases have no warm-up, sampling is constant.
        profit: False gives, for comparison, every bit width the same number of epochs as ONE plain training phase:
            no BN phases, no sampling, nothing frozen.
        freeze: what a frozen layer stops training: "weights" (published) or "weights+intervals".
        resample: measure AIWQ afresh, with everything trainable, before every stage after the first. Adds epochs.
        final_train_intervals: the intervals go on training in the closing BN phase, at `interval_lr_mult * lr`, as in the
            published code (docs/maths.md, section 4).

    Raises:
        ValueError: bit widths out of 2..8, not descending or `profit_bits` not in `weight_bits`; lengths, stages, rates,
            factors or flags of another type or out of range; an unknown `freeze`; a schedule without any phase.
    """

    fp_epochs: int = 15
    act_bits: tuple[int, ...] = (8, 5, 4)
    weight_bits: tuple[int, ...] = (8, 5, 4)
    profit_bits: tuple[int, ...] = (4,)
    bn_epochs: int = 5
    train_epochs: int = 15
    sample_epochs: int = 5
    stages: int = 3
    stage_epochs: int = 15
    final_bn_epochs: int = 5
    lr: float = 0.005
    fp_lr: float | None = None
    warmup_epochs: float = 3.0
    warmup_factor: float = 0.1
    min_lr_factor: float = 1e-3
    interval_lr_mult: float = 1e-2
    weight_decay: float = 4e-5
    profit: bool = True
    freeze: str = "weights"
    resample: bool = False
    final_train_intervals: bool = False
    position: int = field(default=0, init=False)
    phases: tuple[Phase, ...] = field(default=(), init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("act_bits", "weight_bits", "profit_bits"):
            bits = getattr(self, name)
            if isinstance(bits, str) or not isinstance(bits, Sequence):
                raise ValueError(f"{name} must be a sequence of bit widths, as in (8, 5, 4); got {brief(bits)}")
            setattr(self, name, tuple(bits))
        self._validate()
        self.phases = tuple(self._build())
        if not self.phases:
            raise ValueError("the schedule has no phase: every length is 0")

    def _validate(self) -> None:
        for name in ("act_bits", "weight_bits"):
            bits = getattr(self, name)
            if any(isinstance(b, bool) or not isinstance(b, int) or not MIN_BITS <= b <= MAX_BITS for b in bits):
                raise ValueError(f"{name} must be within {MIN_BITS}..{MAX_BITS}, got {bits}")
            if any(low >= high for high, low in zip(bits, bits[1:], strict=False)):
                raise ValueError(f"{name} must descend, as in (8, 5, 4); got {bits}")
        unknown = [b for b in self.profit_bits if b not in self.weight_bits]
        if unknown:
            raise ValueError(f"profit_bits {unknown} are not in weight_bits {self.weight_bits}")
        for name in ("fp_epochs", "bn_epochs", "train_epochs", "sample_epochs", "stage_epochs", "final_bn_epochs"):
            check_whole(getattr(self, name), name, 0, MAX_EPOCHS)
        check_whole(self.stages, "stages", 1, MAX_STAGES)
        check_number(self.lr, "lr", above=0)
        if self.fp_lr is not None:
            check_number(self.fp_lr, "fp_lr", above=0)
        for name in ("warmup_epochs", "interval_lr_mult", "weight_decay"):
            check_number(getattr(self, name), name, 0)
        for name in ("warmup_factor", "min_lr_factor"):
            check_number(getattr(self, name), name, 0, 1)
        for name in ("profit", "resample", "final_train_intervals"):
            check_flag(getattr(self, name), name)
        check_choice(self.freeze, ("weights", "weights+intervals"), "freeze")

    def _phase(self, name: str, kind: str, epochs: int, bits: tuple[int | None, int | None], **changes: Any) -> Phase:
        # BN phases go straight to the cosine; sampling keeps the full rate, as published.
        values: dict[str, Any] = {
            "stage": None,
            "frozen_fraction": 1.0 if kind == "bn" else 0.0,
            "train_weights": kind != "bn",
            "train_intervals": True,
            "lr": self.lr,
            "lr_schedule": "constant" if kind == "sample" else "cosine",
            "warmup_epochs": min(self.warmup_epochs, MAX_WARMUP_SHARE * epochs) if kind == "train" else 0.0,
            "warmup_factor": self.warmup_factor,
            "min_lr_factor": self.min_lr_factor,
            "calibrate": False,
            "interval_lr_mult": self.interval_lr_mult,
            "weight_decay": self.weight_decay,
        }
        return Phase(name=name, kind=kind, epochs=epochs, weight_bits=bits[0], act_bits=bits[1], **(values | changes))

    def _width(self, tag: str, bits: tuple[int | None, int | None], staged: bool, last: bool) -> list[Phase]:
        """The phases of one bit width."""
        phases = [self._phase(f"{tag}.bn", "bn", self.bn_epochs, bits)]
        if staged:
            for stage in range(self.stages):
                if stage == 0 or self.resample:
                    name = f"{tag}.sample{stage or ''}"
                    phases.append(self._phase(name, "sample", self.sample_epochs, bits))
                frozen = {"stage": stage, "frozen_fraction": stage / self.stages}
                phases.append(self._phase(f"{tag}.stage{stage}", "train", self.stage_epochs, bits, **frozen))
        else:
            phases.append(self._phase(f"{tag}.train", "train", self.train_epochs, bits))
        if last:
            intervals = self.final_train_intervals
            phases.append(self._phase(f"{tag}.final", "bn", self.final_bn_epochs, bits, train_intervals=intervals))
        else:
            phases.append(self._phase(f"{tag}.bn2", "bn", self.bn_epochs, bits))
        if not self.profit:
            phases = [self._phase(f"{tag}.train", "train", sum(p.epochs for p in phases), bits)]
        return [p for p in phases if p.epochs > 0]

    def _build(self) -> list[Phase]:
        phases = []
        if self.fp_epochs:
            rates = {"lr": self.fp_lr or self.lr, "train_intervals": False}
            phases.append(self._phase("fp", "train", self.fp_epochs, (None, None), **rates))
        final_act = self.act_bits[-1] if self.act_bits else None
        widths = [(f"a{b}", (None, b), False) for b in self.act_bits]
        widths += [(f"w{b}", (b, final_act), b in self.profit_bits) for b in self.weight_bits]
        for index, (tag, bits, staged) in enumerate(widths):
            phases += self._width(tag, bits, staged, last=index == len(widths) - 1)
        for index, phase in enumerate(phases):
            if phase.act_bits is not None:  # ranges are set once, at the first width, and carried on to the lower ones
                phases[index] = replace(phase, calibrate=True)
                break
        return phases

    @classmethod
    def published(cls, name: str = "mobilenetv2", **changes: Any) -> PhaseSchedule:
        """The recipe of the code published for a network, with `changes` to single values.

        Raises:
            ValueError: no recipe of that name is known.
        """
        if name != "mobilenetv2":
            raise ValueError(f"no published schedule called {name!r}; known: mobilenetv2")
        return cls(**{"final_train_intervals": True, **changes})

    @property
    def total_epochs(self) -> int:
        """Epochs of all phases together."""
        return sum(p.epochs for p in self.phases)

    def __len__(self) -> int:
        return len(self.phases)

    def __getitem__(self, index: int) -> Phase:
        return self.phases[index]

    def __iter__(self) -> Iterator[Phase]:
        while self.position < len(self.phases):
            yield self.phases[self.position]
            self.position += 1

    def state_dict(self) -> dict[str, Any]:
        """Position in the schedule and, to notice a changed recipe, the phases it belongs to (JSON-able)."""
        return {"position": self.position, "phases": [[p.name, p.epochs] for p in self.phases]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Carry on where `state` was taken.

        Raises:
            ValueError: `state` is damaged, or belongs to a schedule with other phases or lengths.
        """
        check_state(state, ("position", "phases"), "PhaseSchedule")
        ours = [[p.name, p.epochs] for p in self.phases]
        theirs = state["phases"]
        if not isinstance(theirs, Sequence) or not all(isinstance(e, (tuple, list)) and len(e) == 2 for e in theirs):
            raise ValueError("saved state of PhaseSchedule: phases must be a list of [name, epochs]")
        theirs = [list(entry) for entry in theirs]
        if ours != theirs:
            differing = [
                f"{a[0]} ({a[1]} epochs) != {b[0]} ({b[1]} epochs)"
                for a, b in zip(theirs, ours, strict=False)
                if a != b
            ]
            detail = differing[0] if differing else f"{len(theirs)} phases != {len(ours)} phases"
            raise ValueError(f"the saved position belongs to another schedule (saved != this one): {detail}")
        self.position = check_whole(state["position"], "saved position", 0, len(self.phases))

    def table(self, columns: Mapping[str, Sequence[str]] | None = None) -> str:
        """The phases as an aligned text table: bits, frozen share, what trains and the learning rates.

        Args:
            columns: further columns, one text per phase.
        """
        extra = dict(columns or {})
        header = ("phase", "kind", "bits", "epochs", "frozen", "trains", "lr start", "lr peak", "lr end", "interval lr", *extra)
        rows = [header]
        for index, p in enumerate(self.phases):
            trains = "+".join(
                part for part, on in (("w", p.train_weights), ("a,c", p.train_intervals), ("bn", True)) if on
            )
            interval = f"{p.lr * p.interval_lr_mult:.3g}" if p.train_intervals else "-"
            rates = [f"{rate:.3g}" for rate in (p.lr_at(0), p.lr, p.lr_at(p.epochs))]
            frozen = f"{p.frozen_fraction:.3g}"
            more = (column[index] for column in extra.values())
            rows.append((p.name, p.kind, p.bits, str(p.epochs), frozen, trains, *rates, interval, *more))
        rows.append(("total", "", "", str(self.total_epochs)) + ("",) * (6 + len(extra)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
