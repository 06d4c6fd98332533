"""AIWQ: activation instability induced by weight quantization, measured while a network trains.

Source: PROFIT (arXiv 2008.04693), section 3.2; docs/maths.md, section 3. Per layer and iteration t, on the same input,
the output with the quantized weights of this iteration is compared with the output that those of iteration t - 1 would
have given: Gaussian KL per output channel, mean over the channels, exponential average over the iterations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from profit_kernels import aiwq_kl, kl_of_pooled, pool_moments, quantized_conv2d_kl, quantized_conv2d_moments
from profit_kernels.layer import NO_QUANTIZER, Norm

from .checks import brief, check_flag, check_module, check_number, check_state, check_whole
from .config import check_choice
from .distributed import sum_over_ranks, world_size
from .errors import TrainingError
from .nn.conv import QuantConv2d

MODES = ("corrected", "original")
MAX_KL = 1.0  # corrected: a channel counts at most this much; original: a layer's step above it is dropped


class AIWQMonitor:
    """Running AIWQ of every convolution that is directly followed by BatchNorm.

    Use::

        with AIWQMonitor(model) as monitor:
            for x, target in loader:
                loss(model(x), target).backward()
                optimizer.step(); optimizer.zero_grad()
                monitor.step()
        scores = monitor.scores()

    What is sampled: forward passes of layers in training mode with gradients enabled, so that evaluation and BatchNorm
    re-estimation in between leave no trace. All forward passes between two calls of `step()` belong to one iteration
    (gradient accumulation, a layer used twice, recomputation in checkpointing): their KLs are averaged into one sample,
    or, with `pooled`, one KL is taken from the moments of all of them. A layer that does not run in an iteration gets no
    sample from it. The observers never wait for the device; reading `scores()`, `clamped` or `skipped` does.

    A deep copy of the model (a weight average, say) is not sampled. Observers and `torch.compile` agree as far as eager hooks
    do: they break the graph while the monitor is attached.

    In several processes (torch.distributed) moments are pooled over all of them, exactly, so that every process has the
    scores of the whole batch; `step()` must then be called by all. In mode "original" each samples its own batches, as
    published, where only the first device's counted: take process 0's scores everywhere.

    Args:
        model: converted model; the layers are its `QuantConv2d` with `ranked` set.
        mode: "corrected" compares with the layer's own padding, counts a channel's KL at most as 1, and leaves out NaN
            channels (a layer's step with no other channel is skipped). "original" is the published code's behaviour:
            the old output always zero-padded, channels with zero deviation left out, a layer's step with a mean above 1
            dropped, and a NaN kept for ever.
        every: sample every k-th iteration only; each sample still compares with the iteration right before.
        decay: of the running mean, in [0, 1). See `profit.decay.aiwq_decay_for` for short runs.
        pooled: take the moments over all forward passes of an iteration, as if they were one batch: with it, gradient
            accumulation and several processes score as one process with the whole batch does. None: where there are
            several processes. Needs the corrected mode.

    Raises:
        ValueError: an argument out of range, or a model without ranked convolutions. TypeError: no model.
    """

    def __init__(
        self, model: nn.Module, mode: str = "corrected", every: int = 1, decay: float = 0.999, pooled: bool | None = None
    ) -> None:
        check_module(model)
        check_choice(mode, MODES, "mode")
        every = check_whole(every, "every", 1)
        check_number(decay, "decay", 0, below=1)
        if pooled is not None:
            check_flag(pooled, "pooled")
        if pooled and mode == "original":
            raise ValueError('pooled=True needs mode="corrected": the published code does not pool')
        self.mode, self.every, self.decay = mode, every, decay
        self.pooled = (world_size() > 1 and mode == "corrected") if pooled is None else pooled
        self._layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantConv2d) and m.ranked}
        if not self._layers:
            raise ValueError("the model has no quantized convolution directly followed by BatchNorm: nothing to rank")
        # Here and not as a decorator: torch.compiler.disable imports the whole compiler.
        self._observe = torch.compiler.disable(self._observe)
        self._iteration = 0
        self._ran: bool | None = False  # whether a forward was seen; None: unknown, before what load_state_dict brought
        self._previous: dict[str, Tensor] = {}  # quantized weights of the iteration before
        self._captured: dict[str, Tensor] = {}  # of this iteration, taken at its first sampled forward
        # (layer index, KL [C]; original: KL [1]; pooled: moments [5, C]) of every forward pass of this iteration
        self._pending: list[tuple[int, Tensor]] = []
        # Columns: running mean, samples in it, channels clamped, steps skipped. float64 holds the counts exactly.
        self._stats = torch.zeros(len(self._layers), 4, dtype=torch.float64)
        self._handles: list[RemovableHandle] = [
            layer.register_observer(_Probe(self, index, name))
            for index, (name, layer) in enumerate(self._layers.items())
        ]

    @torch.no_grad()
    def _observe(self, index: int, name: str, x: Tensor, norm: Norm | None, y_new: Tensor) -> None:
        self._ran = True
        needed_next = (self._iteration + 1) % self.every == 0
        if needed_next and not self._captured:
            # All layers at once, so that one that does not run now still has a previous weight in the next iteration.
            self._captured = {name: _quantized_weight(layer) for name, layer in self._layers.items()}
        if self._sampling():
            layer = self._layers[name]
            measure = _original_kl if self.mode == "original" else partial(_corrected, self.pooled)
            previous = self._previous[name].to(layer.weight.device)
            self._pending.append((index, measure(layer, x, norm, y_new, previous, self._captured.get(name))))

    @torch.no_grad()
    def step(self) -> None:
        """End the iteration: call after every optimizer step, also where the step was skipped."""
        if self.pooled and self._sampling():
            self._fold(*self._pool())  # in several processes also where none of the layers ran in this one
        elif self._pending:
            self._fold(self._pending, torch.ones(len(self._pending)))
        self._pending = []
        self._previous, self._captured = self._captured, {}
        self._iteration += 1

    def _sampling(self) -> bool:
        """Whether this iteration is one of the sampled ones and has weights to compare with."""
        return bool(self._previous) and self._iteration % self.every == 0

    def _pool(self) -> tuple[list[tuple[int, Tensor]], Tensor]:
        """One KL [C] per layer from the moments of all forward passes and processes, and whether the layer ran [layers]."""
        channels = [layer.out_channels for layer in self._layers.values()]
        starts = [sum(channels[:index]) for index in range(len(channels))]
        device = next(iter(self._layers.values())).weight.device
        passes = max(Counter(index for index, _ in self._pending).values(), default=1)
        moments = torch.zeros(passes, 5, sum(channels), dtype=torch.float64, device=device)
        place = Counter[int]()
        for index, part in self._pending:
            moments[place[index], :, starts[index] : starts[index] + channels[index]] = part
            place[index] += 1
        pooled = pool_moments(moments, lambda parts: sum_over_ranks(parts.sum(0)))
        kl = kl_of_pooled(pooled).split(channels)
        return list(enumerate(kl)), (pooled[0, starts] > 0)

    def _fold(self, pending: list[tuple[int, Tensor]], ran: Tensor) -> None:
        """Add this iteration's KLs to the running means; `ran` is 0 for a row that stands for nothing."""
        indices = [index for index, _ in pending]
        # Rows of unequal length are filled up with NaN, which the corrected mean leaves out anyway.
        kl = pad_sequence([kl.double() for _, kl in pending], batch_first=True, padding_value=float("nan"))
        self._stats = self._stats.to(kl.device)
        if self.mode == "corrected":
            rows, over = kl.clamp(max=MAX_KL).nanmean(1), (kl > MAX_KL).sum(1)
            valid_row = ~rows.isnan()
        else:
            rows, over = kl[:, 0], torch.zeros_like(kl[:, 0])
            valid_row = torch.ones_like(rows, dtype=torch.bool)
        layer = torch.tensor(indices).to(kl.device, non_blocking=True)
        totals = torch.stack((rows.where(valid_row, 0.0), valid_row, over, ran.to(rows)), 1).double()
        # index_put_ with accumulate sums in a fixed order on every device, unlike index_add_.
        total, count, over, seen = torch.zeros_like(self._stats).index_put_((layer,), totals, accumulate=True).unbind(1)
        sample = total / count
        valid = (count > 0) if self.mode == "corrected" else (seen > 0) & ~(sample > MAX_KL)
        mean, samples, clamped, skipped = self._stats.unbind(1)
        mean.copy_(torch.where(valid, self.decay * mean + (1.0 - self.decay) * sample, mean))
        samples += valid
        clamped += over
        skipped += (seen > 0) & ~valid

    def running_means(self) -> dict[str, float]:
        """The raw exponential averages, which start from 0."""
        return dict(zip(self._layers, self._stats[:, 0].tolist(), strict=True))

    def samples(self) -> dict[str, int]:
        """How many samples entered each layer's average."""
        return {name: int(n) for name, n in zip(self._layers, self._stats[:, 1].tolist(), strict=True)}

    def scores(self) -> dict[str, float]:
        """AIWQ per layer: the running mean m, bias-corrected as m / (1 - decay^n) for the n samples that entered it.

        A layer without a sample scores 0. In "original" mode a score may be NaN.

        Raises:
            TrainingError: no layer has a sample; it says why.
        """
        samples = self.samples()
        if not any(samples.values()):
            raise TrainingError(f"AIWQ has no sample: {self._why_no_sample()}")
        means = self.running_means()
        return {name: means[name] / (1.0 - self.decay**n) if n else 0.0 for name, n in samples.items()}

    def _why_no_sample(self) -> str:
        if self.skipped:
            why = "NaN" if self.mode == "corrected" else "above 1, and dropped as published"
            return f"all {self.skipped} samples of a layer were {why}: look at the data and the learning rate"
        if self._ran is False and self._iteration > 1:
            return (
                f"step() was called {self._iteration} times, but no ranked layer ran in training mode with gradients: "
                "call model.train() and run the forward outside torch.no_grad()"
            )
        longer = f" ({self.every + 1} with every={self.every})" if self.every > 1 else ""
        return f"train at least two iterations{longer} with the monitor attached, calling step() after each"

    @property
    def steps(self) -> int:
        """How many times `step()` was called."""
        return self._iteration

    @property
    def clamped(self) -> int:
        """How many channel values were clamped at a KL of 1, over all layers and samples."""
        return int(self._stats[:, 2].sum())

    @property
    def skipped(self) -> int:
        """How many samples of a layer were left out, over all layers: only NaN (corrected), mean above 1 (original)."""
        return int(self._stats[:, 3].sum())

    def state_dict(self) -> dict[str, Any]:
        """Everything as of the last `step()`, in tensors and integers: a resumed run samples bit for bit the same."""
        state: dict[str, Any] = {
            "iteration": self._iteration,
            "every": self.every,
            "mode": MODES.index(self.mode),
            "decay": torch.tensor(self.decay, dtype=torch.float64),
        }
        state.update((f"layer.{name}", row.clone()) for name, row in zip(self._layers, self._stats, strict=True))
        state.update((f"previous.{name}", weight.clone()) for name, weight in self._previous.items())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Carry on from `state_dict`.

        Raises:
            ValueError: the state is damaged, or of other layers or of another mode, `every` or decay. The monitor is as
                before then.
        """
        saved = _settings(state)
        if saved != (self.mode, self.every, self.decay):
            raise ValueError(
                f"saved AIWQ state has mode, every, decay = {saved}; this monitor {(self.mode, self.every, self.decay)}"
            )
        iteration = check_whole(state["iteration"], "saved AIWQ state: iteration", 0)
        rows, previous = (
            {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            for prefix in ("layer.", "previous.")
        )
        # Weights of the iteration before are there for all layers, or (not captured) for none.
        for names in (rows, previous) if previous else (rows,):
            differing = sorted(set(names) ^ set(self._layers))
            if differing:
                raise ValueError(f"saved AIWQ state is of other layers; differing: {', '.join(differing[:5])}")
        for name, layer in self._layers.items():
            _check_tensor(rows[name], f"layer.{name}", self._stats.shape[1:])
            if previous:
                _check_tensor(previous[name], f"previous.{name}", layer.weight.shape)
        self._iteration = iteration
        self._stats = torch.stack([rows[name] for name in self._layers]).to(self._stats)
        self._previous = {n: previous[n].to(m.weight.device, copy=True) for n, m in self._layers.items()} if previous else {}
        self._captured, self._pending, self._ran = {}, [], None

    def remove(self) -> None:
        """Detach from the model; what was measured stays readable."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._previous, self._captured, self._pending = {}, {}, []

    def __enter__(self) -> AIWQMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _settings(state: object) -> tuple[str, int, float]:
    """(mode, every, decay) of a saved state. Raises ValueError where it holds none."""
    check_state(state, ("mode", "every", "decay", "iteration"), "AIWQMonitor")
    mode = MODES[check_whole(state["mode"], "saved AIWQ state: mode", 0, len(MODES) - 1)]
    decay = state["decay"].item() if isinstance(state["decay"], Tensor) and state["decay"].numel() == 1 else state["decay"]
    check_number(decay, "saved AIWQ state: decay", 0, below=1)
    return mode, check_whole(state["every"], "saved AIWQ state: every", 1), decay


def _check_tensor(value: object, key: str, shape: torch.Size) -> None:
    if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
        found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else brief(value)
        raise ValueError(f"saved AIWQ state: {key!r} must be a tensor of floats {list(shape)}, got {found}")


class _Probe:
    """The observer of one layer. Copies of the model get `_no_probe` in its place."""

    def __init__(self, monitor: AIWQMonitor, index: int, name: str) -> None:
        self.monitor, self.index, self.name = monitor, index, name

    def __call__(self, layer: QuantConv2d, x: Tensor, norm: Norm | None, y: Tensor) -> None:
        if layer.training and torch.is_grad_enabled():
            self.monitor._observe(self.index, self.name, x, norm, y)

    def __reduce__(self) -> tuple[Any, ...]:
        # copy.deepcopy and pickle both come here: a copied layer must not report to the monitor of the original.
        return _make_no_probe, ()


def _no_probe(layer: QuantConv2d, x: Tensor, norm: Norm | None, y: Tensor) -> None:
    return None


def _make_no_probe() -> Any:
    return _no_probe


def _quantized_weight(layer: QuantConv2d) -> Tensor:
    weight = layer.quantized_weight().detach()
    # Without weight quantization this is the parameter itself, which the optimizer changes in place.
    return weight.clone() if weight.data_ptr() == layer.weight.data_ptr() else weight


def _corrected(
    pooled: bool, layer: QuantConv2d, x: Tensor, norm: Norm | None, y_new: Tensor, weight_old: Tensor, weight_new: Tensor | None
) -> Tensor:
    """KL [C], or moments [5, C], with the layer's own padding; the operator quantizes the raw input itself where it can."""
    if norm is None:
        x = layer.after_norm(x)
    quantizer, conv = layer.input_quantizer.value(), layer.convolution(x)
    if not (layer.input_quantizer.is_duq and layer.padding_mode == "zeros"):
        x, quantizer = layer.input_quantizer(x), NO_QUANTIZER
    if layer.padding_mode != "zeros":
        x = F.pad(x, conv.pads, mode=layer.padding_mode)
        conv = replace(conv, pads=[0, 0, 0, 0])
    values = (x, y_new, norm, quantizer, weight_old, layer.bias, conv)
    return quantized_conv2d_moments(*values) if pooled else quantized_conv2d_kl(*values, weight_new=weight_new)


def _original_kl(
    layer: QuantConv2d, x: Tensor, norm: Norm | None, y_new: Tensor, weight_old: Tensor, weight_new: Tensor | None
) -> Tensor:
    """Mean KL [1] over the channels that vary, the old output zero-padded whatever the layer does."""
    x = F.pad(layer.input_quantizer(layer.after_norm(x)), layer.padding4(x))
    y_old = F.conv2d(x, weight_old.to(x.dtype), layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    kl = aiwq_kl(y_new, y_old, eps=0.0)
    dead = (_deviation(y_new) == 0) | (_deviation(y_old) == 0)
    # 0 / 0 where no channel is live: the NaN is the published behaviour.
    return kl.where(~dead, 0.0).sum().div((~dead).sum()).reshape(1)


def _deviation(y: Tensor) -> Tensor:
    return y.detach().transpose(0, 1).flatten(1).std(1)
