"""A BatchNorm that leaves its work to the convolution behind it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from profit_kernels import block_batch_norm

_SETTINGS = ("num_features", "eps", "momentum", "affine", "track_running_stats")
# One dictionary for both modules, so that .to(), load_state_dict, copies and new hooks reach the original as well.
_SHARED = (
    "_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks",
    "_backward_pre_hooks",
)  # fmt: skip


class DeferredBatchNorm(nn.BatchNorm2d):
    """Stands for a BatchNorm2d and returns its input [N, C, H, W] untouched; its reader applies it (`QuantConv2d.norm`).

    Parameters, buffers and hooks are those of `original`, under the same names, so an optimizer, a checkpoint and
    `model.eval()` see no difference. A forward hook on it sees the tensor in front of BatchNorm.
    """

    def __init__(self, original: nn.BatchNorm2d) -> None:
        nn.Module.__init__(self)
        for name in _SETTINGS:
            setattr(self, name, getattr(original, name))
        for name in _SHARED:
            setattr(self, name, getattr(original, name))
        self.training = original.training
        self._original = (original,)  # in a tuple: not a child, or every parameter would have two names

    def forward(self, x: Tensor) -> Tensor:
        return x

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics of the batch normalise it, rather than the running ones."""
        return self.training or self.running_mean is None

    @property
    def _updated(self) -> bool:
        return self.training and self.track_running_stats

    def count_batch(self) -> float:
        """Count a batch, as BatchNorm2d does, and return the momentum it enters the running statistics with."""
        if not self._updated or self.num_batches_tracked is None:
            return 0.0 if self.momentum is None else self.momentum
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def running(self) -> tuple[Tensor | None, Tensor | None]:
        """The running statistics that a forward reads or changes now."""
        return (self.running_mean, self.running_var) if self._updated or not self.training else (None, None)

    def apply_to(self, x: Tensor) -> Tensor:
        """BatchNorm of x [N, C, H, W] by torch, which also updates the running statistics."""
        self._check_input_dim(x)
        momentum = self.count_batch()
        return F.batch_norm(x, *self.running(), self.weight, self.bias, self.uses_batch, momentum, self.eps)

    def preview(self, x: Tensor) -> Tensor:
        """BatchNorm of x as the reader computes it, without gradient and with no statistics changed."""
        return block_batch_norm(
            x, self.weight, self.bias, self.running_mean, self.running_var, training=self.uses_batch, eps=self.eps
        )

    def restore(self) -> nn.BatchNorm2d:
        """The original module, as this one is now."""
        (original,) = self._original
        for name in _SETTINGS:
            setattr(original, name, getattr(self, name))
        original.training = self.training
        return original

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, deferred"
