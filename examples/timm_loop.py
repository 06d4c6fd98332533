"""In the manner of timm's train.py: its model, its scheduler, its average of weights, its loss. `python examples/timm_loop.py`

Four lines differ from a full-precision script: quantize_, calibrate_, set_bits and param_groups.
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
    """Train `name` at `bits` bits from its weights (random ones here: no download) and test it and its average."""
    torch.manual_seed(0)
    data = digits_data(image_size=32, batch_size=32, limit=limit)
    model = timm.create_model(name, pretrained=False, num_classes=10, in_chans=1)

    profit.quantize_(model, profit.DuQConfig(None, None, padding="zero"), example_inputs=next(iter(data.test))[0][:2])
    profit.set_bits(model, act_bits=bits)
    profit.calibrate_(model, data.calibration, batches=4)
    profit.set_bits(model, weight_bits=bits)
    optimizer = torch.optim.SGD(profit.param_groups(model, lr=0.02, weight_decay=4e-5), momentum=0.9, nesterov=True)

    # timm's schedulers multiply each group's own learning rate, so the intervals keep their hundredth of it.
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=1, warmup_lr_init=1e-4)
    criterion, average = LabelSmoothingCrossEntropy(0.1), ModelEmaV3(model, decay=0.9)
    for epoch in range(epochs):
        model.train()
        data.train.set_epoch(epoch)
        losses = AverageMeter()
        for images, labels in data.train:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update(model)
            losses.update(loss.item(), len(images))
        scheduler.step(epoch + 1)
        print(f"epoch {epoch}: loss {losses.avg:.3f}")
    return {"model": test(model, data.test), "average": test(average.module, data.test), "loss": losses.avg}


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
