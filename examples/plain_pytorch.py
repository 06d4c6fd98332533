"""A plain PyTorch loop: full precision, then 4 bits, then PROFIT's freezing. `python examples/plain_pytorch.py`

Everything of this package that the loop uses works alone: take only what you need.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import profit
from profit.data.digits import digits_data
from profit.models import create_model


def train(model: nn.Module, loader, epochs: int, lr: float, monitor: profit.AIWQMonitor | None = None) -> None:
    """SGD as in the recipe: interval parameters at a hundredth of the rate, decay on weights alone."""
    optimizer = torch.optim.SGD(profit.param_groups(model, lr, weight_decay=4e-5), momentum=0.9, nesterov=True)
    model.train()
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if monitor is not None:
                monitor.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader) -> float:
    """In percent."""
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return 100 * float(torch.cat(right).mean())


def main(epochs: int = 5, limit: int | None = None, bits: int = 4) -> dict[str, float]:
    """Accuracy in full precision and at `bits` bits."""
    torch.manual_seed(0)
    data = digits_data(limit=limit)
    model = create_model("digits_mobilenetv3", classes=10, in_chans=1)

    # Conversion shows what it found; with bits None the network still trains in full precision.
    full = profit.DuQConfig(weight_bits=None, act_bits=None)
    print(profit.quantize_(model, full, example_inputs=next(iter(data.test))[0][:2]))
    train(model, data.train, epochs, lr=0.1)
    found = {"full precision": accuracy(model, data.test)}

    profit.set_bits(model, act_bits=bits)
    profit.calibrate_(model, data.calibration, batches=4)
    profit.set_bits(model, weight_bits=bits)
    with profit.AIWQMonitor(model) as monitor:
        train(model, data.train, epochs, lr=0.02, monitor=monitor)
    freezer = profit.ProgressiveFreezer(model, monitor.scores(), stages=3)
    for stage in range(3):  # the most unstable layers are frozen, none, a third, two thirds of them
        freezer.apply(stage)
        train(model, data.train, epochs, lr=0.02)
    profit.reestimate_bn_(model, data.calibration, batches=4)
    found[f"W{bits}A{bits}"] = accuracy(model, data.test)
    return found


if __name__ == "__main__":
    print(main())
