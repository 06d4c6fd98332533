"""Decays of exponential averages, also for runs too short for the published constants."""

from __future__ import annotations

# An exponential average counts as settled when its start weighs less than exp(-SETTLED_TIME_CONSTANTS) = 0.7 %.
SETTLED_TIME_CONSTANTS = 5.0

PUBLISHED_EMA_DECAY = 0.9997
PUBLISHED_AIWQ_DECAY = 0.999


def _settling_decay(steps: int, default: float) -> float:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0.0 <= default < 1.0:
        raise ValueError(f"default decay must be in [0, 1), got {default}")
    return min(default, max(0.0, 1.0 - SETTLED_TIME_CONSTANTS / steps))


def ema_decay_for(steps: int, default: float = PUBLISHED_EMA_DECAY) -> float:
    """Decay of the weight average for a run in which it lives for `steps` optimizer steps.

    Rule: ``min(default, 1 - 5 / steps)``, not below 0: at least five time constants fit in the run, so that the weights
    it started from keep less than 0.7 % of the average. The published 0.9997 is used from 16 667 steps on.

    Raises:
        ValueError: `steps` < 1 or `default` outside [0, 1).
    """
    return _settling_decay(steps, default)


def aiwq_decay_for(steps: int, default: float = PUBLISHED_AIWQ_DECAY) -> float:
    """Decay of the AIWQ running mean for `steps` sampled iterations.

    Same rule as `ema_decay_for`; the published 0.999 is used from 5 000 samples on. The scores are bias-corrected in
    any case; the rule makes a short sampling phase average over a fifth of itself instead of weighing all of it alike.

    Raises:
        ValueError: `steps` < 1 or `default` outside [0, 1).
    """
    return _settling_decay(steps, default)
