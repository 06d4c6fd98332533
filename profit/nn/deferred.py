"""Stand-ins for the BatchNorms of a converted model, which keep less for the backward than torch's."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from profit_kernels import batch_norm_act, block_batch_norm
from profit_kernels.layer import BatchNorm

_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
# One dictionary for both modules, so that .to(), load_state_dict, copies and new hooks reach the original as well.
_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


class StandIn(nn.BatchNorm2d):
    """In the place of a BatchNorm2d, with its parameters, buffers, children and hooks, under the same names.

    An optimizer, a checkpoint, `model.eval()` and code that looks for BatchNorm2d see no difference.
    """

    def __init__(self, original: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        for name in (*_SETTINGS, *_SHARED):
            setattr(self, name, getattr(original, name))
        self.training = original.training
        self._original = (original,)  # in a tuple: not a child, or every parameter would have two names

    def restore(self) -> nn.BatchNorm2d:
        """The original module, as this one is now."""
        (original,) = self._original
        for name in _SETTINGS:
            setattr(original, name, getattr(self, name))
        original.training = self.training
        return original

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics of the batch normalise it, rather than the running ones."""
        return self.training or self.running_mean is None

    @property
    def _updated(self) -> bool:
        return self.training and self.track_running_stats

    def count_batch(self) -> float:
        """Count a batch, as BatchNorm2d does, and return the momentum with which it enters the running statistics."""
        if not self._updated or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics that a forward reads or changes now."""
        return (self.running_mean, self.running_var) if self._updated or not self.training else (None, None)


class DeferredBatchNorm(StandIn):
    """Returns its input [N, C, H, W] untouched: the convolution that reads it applies it (`QuantConv2d.norm`).

    A forward hook on it sees the tensor in front of BatchNorm.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x

    def apply_to(self, x: Tensor) -> Tensor:
        """BatchNorm of x by torch, which also updates the running statistics."""
        self._check_input_dim(x)
        momentum = self.count_batch()
        return F.batch_norm(x, *self.running(), self.weight, self.bias, self.uses_batch, momentum, self.eps)

    def value(self, momentum: float) -> BatchNorm:
        """What it computes in a forward whose batch enters the running statistics with `momentum`."""
        return BatchNorm(self.weight, self.bias, *self.running(), self.uses_batch, momentum, self.eps)

    def preview(self, x: Tensor) -> Tensor:
        """BatchNorm of x as the reader computes it, without gradient and with no statistics changed."""
        return block_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, training=self.uses_batch, eps=self.eps
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deferred"


class BatchNormAct(StandIn):
    """BatchNorm and the activation inside it (timm's BatchNormAct2d; "none" for a plain BatchNorm2d) in one operator."""

    def __init__(self, original: nn.BatchNorm2d, activation: str) -> None:
        super().__init__(original)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        momentum = self.count_batch()
        return batch_norm_act(
            x, self.weight, self.bias, *self.running(), training=self.uses_batch, momentum=momentum, eps=self.eps,
            activation=self.activation,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"
