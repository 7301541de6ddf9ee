"""A language model trained by four ranks has the losses of one device, beside FSDP2 too."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from attention import AttentionConfig, MultiheadConfig, ShardingConfig, SparsePatternConfig, build

SEQ, BATCH, WORDS, WIDTH, STEPS = 52, 2, 29, 16, 20
HEADS = MultiheadConfig(embed_dim=WIDTH, num_heads=4)
CONFIGS = (
    AttentionConfig(
        variant="block_sparse",
        pattern=SparsePatternConfig(
            pattern_type="local_window", block_size=4, local_window_size=9, edges="token"
        ),
        multihead=HEADS,
    ),
    AttentionConfig(variant="dilated", segment_lengths=(8, 32), dilation_rates=(1, 2), multihead=HEADS),
)


class Model(nn.Module):
    """Two layers of attention over words and their positions."""

    def __init__(self, sharding: ShardingConfig | None, group=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(SEQ, WIDTH)
        configs = (config.model_copy(update={"sharding": sharding}) for config in CONFIGS)
        self.layers = nn.ModuleList(build(config, process_group=group) for config in configs)
        self.last = nn.Linear(WIDTH, WORDS)
        self.double()

    def forward(self, words: Tensor, places: Tensor) -> Tensor:
        x = self.words(words) + self.places(places)
        for layer in self.layers:
            x = x + layer(x, x, x, is_causal=True)[0]
        return self.last(x)


def texts() -> tuple[Tensor, Tensor]:
    """(words, the ones that follow), [BATCH, SEQ]. Labels are shifted before they are sharded."""
    words = torch.randint(WORDS, (BATCH, SEQ + 1), generator=torch.Generator().manual_seed(1))
    return words[:, :-1].contiguous(), words[:, 1:].contiguous()


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """This rank's part of the mean over all words of all ranks."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (
        BATCH * SEQ
    )


@torch.no_grad()
def step(model: nn.Module) -> None:
    """By hand: torch's optimizers import its compiler, on every rank."""
    for parameter in model.parameters():
        parameter -= 0.5 * parameter.grad


def losses_of_one_device() -> list[float]:
    model, (words, labels) = Model(None), texts()
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(words, torch.arange(SEQ)), labels)
        model.zero_grad()
        loss.backward()
        step(model)
        losses.append(loss.item())
    return losses


def trained(rank: int, exchange: str) -> list[float]:
    """The losses of ranks that share one sequence."""
    model = Model(ShardingConfig(exchange=exchange, timeout_s=30))
    first = model.layers[0]
    words, labels = (first.shard(x) for x in texts())
    places = first.positions(SEQ)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(words, places), labels)
        model.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        step(model)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


def trained_by_fsdp(rank: int) -> list[float]:
    """The losses on a mesh of 2 x 2: a sequence each of two pairs of ranks, parameters over all four."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    model = Model(ShardingConfig(exchange="keys", timeout_s=30), mesh["cp"])
    first = model.layers[0]
    item = slice(mesh["dp"].get_local_rank(), mesh["dp"].get_local_rank() + 1)
    words, labels = (first.shard(x[item]) for x in texts())
    places = first.positions(SEQ)
    flat = mesh["dp", "cp"]._flatten("dp_cp")
    for layer in model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model(words, places), labels)
        model.zero_grad()
        (loss * 4).backward()  # FSDP2 takes the mean over ranks
        step(model)
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses


@pytest.mark.parametrize("exchange", ["keys", pytest.param("heads", marks=pytest.mark.slow)])
def test_losses_are_those_of_one_device(exchange, ranks):
    wanted = losses_of_one_device()
    assert wanted[-1] < wanted[0] - 0.5
    for losses in ranks(4).run(trained, exchange):
        assert max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-9


@pytest.mark.slow
def test_losses_beside_fsdp_are_those_of_one_device(ranks):
    for losses in ranks(4).run(trained_by_fsdp):
        pairs = itertools.zip_longest(losses, losses_of_one_device())
        assert max(abs(a - b) for a, b in pairs) <= 1e-9
