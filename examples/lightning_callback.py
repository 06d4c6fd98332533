"""PROFIT as a Lightning callback: your LightningModule and Trainer stay as they are. `python examples/lightning_callback.py`

Needs `pip install lightning`. The callback quantizes at a given epoch, samples AIWQ for one epoch, then freezes in stages.
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import profit
from profit.data.digits import digits_data
from profit.models import create_model


class ProfitCallback(lightning.Callback):
    """Quantize `module.model` (converted before, in full precision) while it trains.

    Args:
        loader: batches for calibration.
        bits: of weights and activations.
        quantize_at: epoch at whose start the network becomes quantized; AIWQ is sampled during this epoch.
        stages: the epochs after it freeze 0, 1/stages, ... of the ranked convolutions, one stage an epoch.
    """

    def __init__(self, loader, bits: int = 4, quantize_at: int = 1, stages: int = 3) -> None:
        self.loader, self.bits, self.quantize_at, self.stages = loader, bits, quantize_at, stages
        self.monitor: profit.AIWQMonitor | None = None
        self.freezer: profit.ProgressiveFreezer | None = None

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if trainer.current_epoch == self.quantize_at:
            profit.set_bits(module.model, act_bits=self.bits)
            profit.calibrate_(module.model, self.loader, batches=4)
            profit.set_bits(module.model, weight_bits=self.bits)
            self.monitor = profit.AIWQMonitor(module.model)
        elif self.freezer is not None:
            self.freezer.apply(min(trainer.current_epoch - self.quantize_at - 1, self.stages - 1))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.monitor is not None:
            self.monitor.step()

    def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if self.monitor is not None:
            self.freezer = profit.ProgressiveFreezer(module.model, self.monitor.scores(), stages=self.stages)
            self.monitor.remove()
            self.monitor = None


class Classifier(lightning.LightningModule):
    """An ordinary module; only `param_groups` and the conversion are of this package."""

    def __init__(self, model: nn.Module, lr: float = 0.05) -> None:
        super().__init__()
        self.model, self.lr = model, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(profit.param_groups(self.model, self.lr, weight_decay=4e-5), momentum=0.9)


def main(epochs: int = 5, limit: int | None = None) -> tuple[nn.Module, ProfitCallback]:
    """Train; the model and the callback."""
    lightning.seed_everything(0, verbose=False)
    data = digits_data(limit=limit)
    model = create_model("digits_mobilenetv3", classes=10, in_chans=1)
    profit.quantize_(model, profit.DuQConfig(weight_bits=None, act_bits=None), next(iter(data.test))[0][:2])
    callback = ProfitCallback(data.calibration)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Classifier(model), data.train)
    return model, callback


if __name__ == "__main__":
    print(profit.layer_table(main()[0]))
