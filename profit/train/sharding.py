"""Every process its part of the data, and every batch in micro-batches.

`data.batch_size` is the batch of one optimizer step, whatever the number of processes. It is cut into `group` = processes x
`optim.accumulate` micro-batches of equal size; micro-batch m of process r is number m * processes + r. So the images of a
step, and the micro-batches over which BatchNorm takes its statistics, are the same for 4 processes, for 2 that accumulate
2, and for 1 that accumulates 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Sampler

from profit.data import DataBundle, Loader
from profit.data.timm_data import TimmLoader
from profit.distributed import gather
from profit.errors import RecipeError


def shard(data: DataBundle, *, batch_size: int, accumulate: int, rank: int, world: int, seed: int) -> DataBundle:
    """The part of `data` that process `rank` of `world` works on.

    Training batches come as `accumulate` micro-batches each, a batch that is not full is left out. Test and calibration
    batches are dealt in turn.

    Raises:
        RecipeError: a batch that cannot be cut into equal micro-batches.
    """
    group = world * accumulate
    if batch_size % group:
        raise RecipeError(
            f"data.batch_size={batch_size} cannot be cut into equal parts for {world} processes x optim.accumulate="
            f"{accumulate}: choose a multiple of {group}"
        )
    train = data.train
    if isinstance(train, TimmLoader):
        train = _timm_training(train, batch_size // group, rank, world, accumulate, seed)
    elif group > 1:
        train = MicroBatches(train, rank, world, accumulate)
    test, calibration = (_in_turn(loader, rank, world) for loader in (data.test, data.calibration))
    return replace(data, train=train, test=test, calibration=calibration)


class MicroBatches:
    """This process's micro-batches of a loader that gives whole batches."""

    def __init__(self, loader: Loader, rank: int, world: int, accumulate: int) -> None:
        self.loader, self.rank, self.world, self.accumulate = loader, rank, world, accumulate

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader) * self.accumulate

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        group = self.world * self.accumulate
        for images, labels in self.loader:
            if len(images) % group:
                raise RecipeError(f"a batch of {len(images)} images (all there are) cannot be cut into {group} equal parts: "
                                  "lower data.batch_size")  # fmt: skip
            parts = list(zip(images.chunk(group), labels.chunk(group), strict=True))
            yield from parts[self.rank :: self.world]


class InTurn:
    """Every `world`-th batch of a loader."""

    def __init__(self, loader: Loader, rank: int, world: int) -> None:
        self.loader, self.rank, self.world = loader, rank, world

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.loader), self.world))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.loader), self.rank, None, self.world)


class _BatchIndices(Sampler[list[int]]):
    """Which images make up this process's batches; only those are read.

    Args:
        order: of the images; None shuffles them anew in every epoch, as a function of (seed, epoch) alone.
        group: training drops batches that do not make up a whole group of this many; 0 keeps all, also one that is not full.
    """

    def __init__(
        self, count: int, size: int, rank: int, world: int, *, order: Sequence[int] | None, group: int, seed: int
    ) -> None:
        self.count, self.size, self.rank, self.world = count, size, rank, world
        self.order, self.group, self.seed, self.epoch = order, group, seed, 0

    def _batches(self) -> int:
        return self.count // (self.size * self.group) * self.group if self.group else -(-self.count // self.size)

    def __len__(self) -> int:
        return len(range(self.rank, self._batches(), self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order
        if order is None:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
            order = torch.randperm(self.count, generator=generator).tolist()
        for batch in range(self.rank, self._batches(), self.world):
            yield list(order[batch * self.size : (batch + 1) * self.size])


class _TimmPart:
    """A timm loader over batches of its own."""

    def __init__(self, loader: TimmLoader, sampler: _BatchIndices) -> None:
        self.sampler = sampler
        self.loader = _rebuilt(loader, batch_sampler=sampler)

    def set_epoch(self, epoch: int) -> None:
        self.sampler.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


class _Streamed:
    """A timm loader that streams (webdataset): its reader deals the shards to the processes; all take equally many batches."""

    def __init__(self, loader: TimmLoader, size: int, accumulate: int) -> None:
        self.loader = _rebuilt(loader, batch_size=size, drop_last=True)
        fewest = int(gather(torch.tensor([len(self.loader)])).min())
        self.batches = fewest - fewest % accumulate

    def set_epoch(self, epoch: int) -> None:
        dataset = _plain(self.loader).dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(iter(self.loader), self.batches)


def _timm_training(loader: TimmLoader, size: int, rank: int, world: int, accumulate: int, seed: int) -> Loader:
    dataset = _plain(loader).dataset
    if isinstance(dataset, IterableDataset):
        return _Streamed(loader, size, accumulate)
    size = min(size, max(len(dataset) // (world * accumulate), 1))
    return _TimmPart(loader, _BatchIndices(len(dataset), size, rank, world, order=None, group=world * accumulate, seed=seed))


def _in_turn(loader: Loader, rank: int, world: int) -> Loader:
    if world == 1:
        return loader
    if not isinstance(loader, TimmLoader):
        return InTurn(loader, rank, world)
    plain = _plain(loader)
    if isinstance(plain.dataset, IterableDataset):
        return loader
    order = list(plain.sampler)
    return _TimmPart(loader, _BatchIndices(len(order), plain.batch_size, rank, world, order=order, group=0, seed=0))


def _plain(loader: TimmLoader) -> DataLoader[Any]:
    """torch's loader, which timm's prefetcher keeps inside."""
    return getattr(loader.loader, "loader", loader.loader)


def _rebuilt(loader: TimmLoader, **batching: Any) -> TimmLoader:
    """The same loader with other batches; timm's prefetcher, if there is one, is kept."""
    plain = _plain(loader)
    fresh = DataLoader(
        plain.dataset, num_workers=plain.num_workers, collate_fn=plain.collate_fn, pin_memory=plain.pin_memory,
        worker_init_fn=plain.worker_init_fn, **batching,
    )  # fmt: skip
    if plain is loader.loader:
        return TimmLoader(fresh, loader.device)
    loader.loader.loader = fresh
    return loader


def epoch_seed(seed: int, epoch: int, rank: int) -> int:
    """Seed of what is drawn in one epoch of one process (augmentation, dropout), so that nothing drawn need be stored."""
    return (seed * 1_000_003 + epoch) * 65_537 + rank


