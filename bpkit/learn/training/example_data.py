"""Batches of examples for Lightning: in the same order for the same seed, whether a run was interrupted or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bpkit.learn.training.examples import Examples


class Rows(Dataset[Examples]):
    """Examples by row; a whole batch at once."""

    def __init__(self, data: Examples) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(next(iter(self.data.values())))

    def __getitem__(self, row: int) -> Examples:
        return {name: tensor[row] for name, tensor in self.data.items()}

    def __getitems__(self, rows: list[int]) -> Examples:
        places = torch.tensor(rows)
        return {name: tensor[places] for name, tensor in self.data.items()}


class EpochSampler(Sampler[int]):
    """Rows in an order that follows from seed and epoch alone; each of several processes takes every n-th.

    All processes take the same number of rows: the first rows of the order are taken twice if need be.
    """

    def __init__(self, count: int, *, seed: int | None, rank: int = 0, processes: int = 1) -> None:
        self.count, self.seed, self.rank, self.processes = count, seed, rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Lightning says which epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.count // self.processes)

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            order = torch.arange(self.count)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.count, generator=generator)
        missing = len(self) * self.processes - self.count
        order = torch.cat([order, order[:missing]])
        return iter(order[self.rank :: self.processes].tolist())


class ExampleData(L.LightningDataModule):
    """Examples for training and validation, in memory."""

    def __init__(self, train: Examples, validation: Examples, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self.train, self.validation, self.batch_size, self.seed = train, validation, batch_size, seed

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.validation, None)

    def _loader(self, data: dict[str, Tensor], seed: int | None) -> DataLoader[Any]:
        trainer = self.trainer
        rank, processes = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        rows = Rows(data)
        sampler = EpochSampler(len(rows), seed=seed, rank=rank, processes=processes)
        return DataLoader(rows, batch_size=self.batch_size, sampler=sampler, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch
