"""DDP adds up the gradients of a process's first step as it does those of all later ones."""

import multiprocessing
from types import SimpleNamespace

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from rltoken.trl_saving import settle_buckets

RANKS = 3
"""Sums of two numbers are the same in either order."""


class Model(nn.Module):
    """Its layers are not made in the order in which they are used, by which DDP arranges its buckets at first."""

    def __init__(self):
        super().__init__()
        self.last, self.embed, self.first = nn.Linear(29, 7), nn.Embedding(5, 13), nn.Linear(13, 29)

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.last(self.first(self.embed(input_ids)).tanh()))


def gradients(model, rank):
    """Of the same batch of this rank."""
    batch = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(rank))
    model.zero_grad()
    model(input_ids=batch).logits.square().sum().backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def compare(rank, folder):
    """Write whether the gradients of the first step are those of the second."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    torch.manual_seed(1)
    model = DistributedDataParallel(Model())
    settle_buckets(model)
    assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    same = torch.equal(gradients(model, rank), gradients(model, rank))
    (folder / f"rank{rank}").write_text(str(same))
    distributed.barrier()
    distributed.destroy_process_group()


def test_the_first_step_of_a_process_sums_as_every_later_one(tmp_path):
    ranks = [
        multiprocessing.get_context("fork").Process(target=compare, args=(rank, tmp_path)) for rank in range(RANKS)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(timeout=60)
        rank.kill()
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(RANKS)] == ["True"] * RANKS
