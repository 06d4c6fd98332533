"""In the manner of timm's train.py: its model, its scheduler, its average of weights, its loss. `python examples/timm_loop.py`

What is added to a full-precision script: quantize_, calibrate_, set_bits and param_groups.
"""

from __future__ import annotations

import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import AverageMeter, ModelEmaV3, accuracy

import profit
from profit.data.digits import digits_data


def main(name: str = "mobilenetv3_small_050", epochs: int = 3, limit: int | None = 512, bits: int = 4) -> dict[str, float]:
    """Train `name` in full precision (in place of pretrained weights: no download), then at `bits` bits, and test it."""
    torch.manual_seed(0)
    data = digits_data(image_size=32, batch_size=32, limit=limit)
    model = timm.create_model(name, pretrained=False, num_classes=10, in_chans=1)

    profit.quantize_(model, profit.DuQConfig(None, None), example_inputs=next(iter(data.test))[0][:2])
    train(model, data.train, epochs, lr=0.05)
    profit.reestimate_bn_(model, data.calibration, batches=4)  # so short a training leaves the statistics behind
    profit.set_bits(model, act_bits=bits)
    profit.calibrate_(model, data.calibration, batches=4)
    profit.set_bits(model, weight_bits=bits)
    average, loss = train(model, data.train, epochs, lr=0.01)
    return {"model": test(model, data.test), "average": test(average, data.test), "loss": loss}


def train(model: torch.nn.Module, loader, epochs: int, lr: float) -> tuple[torch.nn.Module, float]:
    """The average of the weights, and the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(profit.param_groups(model, lr, weight_decay=4e-5), momentum=0.9, nesterov=True)
    # timm's schedulers multiply each group's own learning rate, so the intervals keep their hundredth of it.
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs)
    criterion, average = LabelSmoothingCrossEntropy(0.1), ModelEmaV3(model, decay=0.9)
    for epoch in range(epochs):
        model.train()
        loader.set_epoch(epoch)
        losses = AverageMeter()
        for images, labels in loader:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.update(loss.item(), len(images))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {losses.avg:.3f}")
    return average.module, losses.avg


@torch.no_grad()
def test(model: torch.nn.Module, loader) -> float:
    """Top-1 accuracy in percent."""
    model.eval()
    top1 = AverageMeter()
    for images, labels in loader:
        top1.update(accuracy(model(images), labels)[0].item(), len(images))
    return top1.avg


if __name__ == "__main__":
    print(main())
