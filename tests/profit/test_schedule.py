"""The recipe as a table: phases, bits, frozen share, what trains and the learning rates."""

from __future__ import annotations

import json
import math

import pytest

from profit.decay import aiwq_decay_for, ema_decay_for
from profit.schedule import PhaseSchedule

# name, weight bits, activation bits, epochs, frozen fraction, weights train, intervals train: the published MobileNetV2 recipe.
PUBLISHED = [
    ("fp", None, None, 15, 0, True, False),
    ("a8.bn", None, 8, 5, 1, False, True),
    ("a8.train", None, 8, 15, 0, True, True),
    ("a8.bn2", None, 8, 5, 1, False, True),
    ("a5.bn", None, 5, 5, 1, False, True),
    ("a5.train", None, 5, 15, 0, True, True),
    ("a5.bn2", None, 5, 5, 1, False, True),
    ("a4.bn", None, 4, 5, 1, False, True),
    ("a4.train", None, 4, 15, 0, True, True),
    ("a4.bn2", None, 4, 5, 1, False, True),
    ("w8.bn", 8, 4, 5, 1, False, True),
    ("w8.train", 8, 4, 15, 0, True, True),
    ("w8.bn2", 8, 4, 5, 1, False, True),
    ("w5.bn", 5, 4, 5, 1, False, True),
    ("w5.train", 5, 4, 15, 0, True, True),
    ("w5.bn2", 5, 4, 5, 1, False, True),
    ("w4.bn", 4, 4, 5, 1, False, True),
    ("w4.sample", 4, 4, 5, 0, True, True),
    ("w4.stage0", 4, 4, 15, 0, True, True),
    ("w4.stage1", 4, 4, 15, 1 / 3, True, True),
    ("w4.stage2", 4, 4, 15, 2 / 3, True, True),
    ("w4.final", 4, 4, 5, 1, False, True),
]


def test_published_phases():
    schedule = PhaseSchedule.published("mobilenetv2")
    rows = [
        (p.name, p.weight_bits, p.act_bits, p.epochs, p.frozen_fraction, p.train_weights, p.train_intervals)
        for p in schedule.phases
    ]
    assert rows == PUBLISHED
    assert len(schedule) == 22
    # 15 + 3 * 25 + 2 * 25 + (5 + 5 + 45 + 5): what the paper says in one number.
    assert schedule.total_epochs == sum(row[3] for row in PUBLISHED) == 200
    assert [p.stage for p in schedule.phases if p.stage is not None] == [0, 1, 2]
    assert [p.name for p in schedule.phases if p.calibrate] == ["a8.bn"]
    assert {p.kind for p in schedule.phases} == {"train", "bn", "sample"}
    assert [p.bits for p in schedule.phases[::7]] == ["W32A32", "W32A4", "W5A4", "W4A4"]
    with pytest.raises(ValueError, match="mobilenetv9"):
        PhaseSchedule.published("mobilenetv9")


def test_published_learning_rates():
    phases = {p.name: p for p in PhaseSchedule().phases}
    for p in phases.values():
        assert (p.lr, p.interval_lr_mult, p.weight_decay) == (0.005, 1e-2, 4e-5)
    train = phases["w4.stage1"]
    # epochs 0..3 warm up linearly from a tenth; then half a cosine over 12 epochs down to a thousandth
    expected = {
        0: 0.0005,
        1: 0.002,
        3: 0.005,
        6: 0.005 * (0.001 + 0.999 * (1 + math.sqrt(0.5)) / 2),
        9: 0.0025025,
        15: 5e-6,
    }
    for epoch, rate in expected.items():
        assert train.lr_at(epoch) == pytest.approx(rate), epoch
    assert (train.lr_at(-1), train.lr_at(99)) == (train.lr_at(0), train.lr_at(15))
    bn = phases["w4.final"]
    assert [bn.lr_at(t) for t in (0, 2.5, 5)] == pytest.approx([0.005, 0.0025025, 5e-6])
    sample = phases["w4.sample"]
    assert sample.lr_schedule == "constant" and {sample.lr_at(t) for t in (0, 1, 4.99, 5)} == {0.005}
    rates = [train.lr_at(t / 10) for t in range(151)]
    assert rates[:31] == sorted(rates[:31]) and rates[30:] == sorted(rates[30:], reverse=True)


def test_warmup_is_at_most_a_fifth_of_a_short_phase():
    schedule = PhaseSchedule(train_epochs=2, fp_lr=0.01)
    phase = next(p for p in schedule.phases if p.name == "w8.train")
    assert phase.warmup_epochs == pytest.approx(0.4) and phase.lr_at(0.4) == pytest.approx(0.005)
    assert schedule[0].lr == 0.01
    assert all(p.warmup_epochs == 0 for p in schedule.phases if p.kind != "train")
    assert PhaseSchedule(warmup_epochs=0)[0].lr_at(0) == 0.005


def test_three_bits_use_profit_at_every_listed_width():
    schedule = PhaseSchedule(act_bits=(8, 5, 4, 3), weight_bits=(8, 5, 4, 3), profit_bits=(4, 3))
    names = [p.name for p in schedule.phases]
    for width, closing in (("w4", "w4.bn2"), ("w3", "w3.final")):
        parts = [f"{width}.{part}" for part in ("bn", "sample", "stage0", "stage1", "stage2")] + [closing]
        assert [n for n in names if n.startswith(width)] == parts
    assert [p.name for p in schedule.phases if not p.train_intervals] == ["fp", "w3.final"]
    assert {(p.weight_bits, p.act_bits) for p in schedule.phases if p.name.startswith("w")} == {
        (b, 3) for b in (8, 5, 4, 3)
    }
    assert schedule.total_epochs == 15 + 4 * 25 + 2 * 25 + 2 * 60


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"act_bits": (8, 4, 2), "weight_bits": (8, 4, 2), "profit_bits": (2,), "stages": 4, "bn_epochs": 1},
        {"resample": True, "final_bn_epochs": 2},
        {"fp_epochs": 0, "profit_bits": ()},
    ],
)
def test_plain_training_has_the_same_budget_per_width(changes):
    ours, plain = PhaseSchedule(**changes), PhaseSchedule(**changes, profit=False)
    assert ours.total_epochs == plain.total_epochs
    for phase in plain.phases:
        width = phase.name.split(".")[0]
        assert phase.kind == "train" and phase.train_weights and phase.frozen_fraction == 0
        assert phase.epochs == sum(p.epochs for p in ours.phases if p.name.split(".")[0] == width)
    assert sum(p.calibrate for p in plain.phases) == 1


def test_variants():
    resampled = [p.name for p in PhaseSchedule(resample=True).phases if p.weight_bits == 4]
    assert resampled == [
        "w4.bn", "w4.sample", "w4.stage0", "w4.sample1", "w4.stage1", "w4.sample2", "w4.stage2", "w4.final",
    ]  # fmt: skip
    weights_only = PhaseSchedule(act_bits=(), weight_bits=(4,), bn_epochs=0, final_bn_epochs=0, fp_epochs=0)
    assert [p.name for p in weights_only.phases] == ["w4.sample", "w4.stage0", "w4.stage1", "w4.stage2"]
    assert not any(p.calibrate for p in weights_only.phases)
    acts_only = PhaseSchedule(weight_bits=(), profit_bits=())
    assert acts_only[len(acts_only) - 1].name == "a4.final" and not acts_only[-1].train_intervals
    assert PhaseSchedule(freeze="weights+intervals").freeze == "weights+intervals"


def test_iteration_resumes_where_it_broke_off():
    schedule = PhaseSchedule()
    seen = []
    for phase in schedule:
        if phase.name == "w8.train":
            break
        seen.append(phase.name)
    saved = json.loads(json.dumps(schedule.state_dict()))
    resumed = PhaseSchedule()
    resumed.load_state_dict(saved)
    seen += [p.name for p in resumed]
    assert seen == [row[0] for row in PUBLISHED]
    assert resumed.position == len(resumed) and list(resumed) == []
    with pytest.raises(ValueError, match="another schedule.*15"):
        PhaseSchedule(train_epochs=3).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"w5.bn2 \(5 epochs\) != w5.final \(5 epochs\)"):
        PhaseSchedule(weight_bits=(8, 5), profit_bits=()).load_state_dict(saved)
    with pytest.raises(ValueError, match="22 phases != 21 phases"):
        PhaseSchedule(final_bn_epochs=0).load_state_dict(saved)
    with pytest.raises(ValueError, match="99"):
        resumed.load_state_dict(saved | {"position": 99})


def test_the_final_phase_trains_the_intervals_only_where_asked():
    """As published: at a hundredth of the rate, so from 5e-5 on."""
    asked, plain = PhaseSchedule(final_train_intervals=True), PhaseSchedule()
    assert asked == PhaseSchedule.published() and plain == PhaseSchedule.published(final_train_intervals=False)
    assert asked.phases[:-1] == plain.phases[:-1]
    assert (asked[-1].train_intervals, plain[-1].train_intervals) == (True, False)
    assert not asked[-1].train_weights and asked[-1].lr_at(0) * asked[-1].interval_lr_mult == pytest.approx(5e-5)
    rows = [schedule.table().splitlines()[-2].split() for schedule in (asked, plain)]
    assert rows[0] == ["w4.final", "bn", "W4A4", "5", "1", "a,c+bn", "0.005", "0.005", "5e-06", "5e-05"]
    assert rows[1] == ["w4.final", "bn", "W4A4", "5", "1", "bn", "0.005", "0.005", "5e-06", "-"]
    with pytest.raises(ValueError, match="final_train_intervals"):
        PhaseSchedule(final_train_intervals=1)


def test_table():
    lines = PhaseSchedule().table().splitlines()
    assert lines[0].split()[:5] == ["phase", "kind", "bits", "epochs", "frozen"]
    assert len(lines) == 24
    row = next(line.split() for line in lines if line.startswith("w4.stage1"))
    assert row == ["w4.stage1", "train", "W4A4", "15", "0.333", "w+a,c+bn", "0.0005", "0.005", "5e-06", "5e-05"]
    assert lines[-1].split() == ["total", "200"]


@pytest.mark.parametrize("state", [None, {}, {"phases": 3, "position": 0}, {"phases": [1], "position": 0}], ids=str)
def test_damaged_state_is_refused(state):
    with pytest.raises(ValueError, match="^saved state of PhaseSchedule: "):
        PhaseSchedule().load_state_dict(state)


@pytest.mark.parametrize(
    "bad",
    [
        {"act_bits": (9, 4)}, {"weight_bits": (4, 1)}, {"weight_bits": (4, 8)}, {"act_bits": (4, 4)}, {"profit_bits": (3,)},
        {"bn_epochs": -1}, {"train_epochs": 1.5}, {"stages": 0}, {"lr": 0.0}, {"fp_lr": -1.0}, {"freeze": "none"},
        {"lr": "a"}, {"lr": math.nan}, {"fp_lr": True}, {"stages": 2.5}, {"stages": "3"}, {"bn_epochs": True},
        {"weight_decay": -1.0}, {"weight_decay": math.nan}, {"interval_lr_mult": "a"}, {"warmup_epochs": None},
        {"act_bits": 4}, {"weight_bits": "84"}, {"weight_bits": (8.0, 4)}, {"profit": "no"}, {"freeze": 3},
        {"warmup_factor": 2.0}, {"fp_epochs": 0, "act_bits": (), "weight_bits": (), "profit_bits": ()},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_schedules_are_refused(bad):
    with pytest.raises(ValueError) as caught:
        PhaseSchedule(**bad)
    assert "\n" not in str(caught.value)


def test_decays_settle_in_short_runs():
    assert aiwq_decay_for(25_000) == 0.999 and ema_decay_for(375_000) == 0.9997
    assert aiwq_decay_for(5_000) == pytest.approx(0.999) and ema_decay_for(1) == 0.0
    for steps in (10, 100, 1000, 10_000):
        assert ema_decay_for(steps) ** steps < math.exp(-5) or ema_decay_for(steps) == 0.9997
        assert aiwq_decay_for(steps) <= ema_decay_for(steps)
    assert aiwq_decay_for(1000, default=0.9) == 0.9
    for arguments in ((0,), (10, 1.0)):
        with pytest.raises(ValueError):
            aiwq_decay_for(*arguments)
