"""What test_processes.py runs under torchrun with two processes; process 0 writes what it found as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

from profit import AIWQMonitor, calibrate_, reestimate_bn_
from profit.bn import sync_batchnorm
from profit.distributed import agree, average_buffers_, gather, rank, world_size
from profit.train.processes import distributed_model, process_group

from ..tiny_net import batch, tiny_net, train_step

STEPS, BATCH, SEED = 6, 8, 11


def images(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The whole batches of all steps, float64: a code that flips by the order of sums would hide an error in the reduction."""
    return [(x.double(), y) for x, y in (batch(generator, BATCH) for _ in range(STEPS))]


def measure(accumulate: int = 1, sync: bool = True) -> dict:
    """Calibrate, train with AIWQ and re-estimate BatchNorm, each process on its part of every batch."""
    generator = torch.Generator().manual_seed(SEED)
    net, data = tiny_net(generator).double(), images(generator)
    parts, own = world_size() * accumulate, slice(rank(), None, world_size())
    mine = [list(zip(x.chunk(parts), y.chunk(parts), strict=True))[own] for x, y in data]
    found: dict = {"ranges": calibrate_(net, [part[0] for parts_ in mine for part in parts_], batches=100)}
    if sync and world_size() > 1:
        sync_batchnorm(net)
    model = distributed_model(net, torch.device("cpu"), find_unused=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
    losses = []
    with AIWQMonitor(net, decay=0.5, pooled=True) as monitor:
        for parts_ in mine:
            if accumulate == 1:
                losses.append(gather(train_step(model, optimizer, *parts_[0]).reshape(1)).mean().item())
            else:
                optimizer.zero_grad()
                for x, y in parts_:
                    (nn.functional.cross_entropy(net(x), y) / accumulate).backward()
                optimizer.step()
            monitor.step()
    found |= {"losses": losses, "scores": monitor.scores(), "skipped": monitor.skipped}
    average_buffers_(net)
    found["weight"] = net.pw.weight.detach().flatten().tolist()
    found["used"] = reestimate_bn_(net, [part[0] for parts_ in mine for part in parts_], batches=100)
    found["mean"] = net.bn1.running_mean.tolist()
    return found


def main() -> None:
    torch.set_num_threads(1)
    with process_group(60):
        found = {"synced": measure(), "ghost": measure(sync=False)}
        found["agreed"] = agree({"rank": rank(), "text": "ä", "nan": float("nan"), "list": [1, 2.5]})
        found["gathered"] = gather(torch.arange(rank() + 2)).tolist()
        found["everywhere"] = gather(torch.tensor(list(found["synced"]["scores"].values()))).tolist()
        if rank() == 0:
            Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
