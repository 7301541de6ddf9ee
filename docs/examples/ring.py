"""Trains a model whose sequences all ranks share: torchrun --nproc-per-node 2 docs/examples/ring.py"""

import os

import torch
import torch.distributed as dist
from torch import nn

from attention import AttentionConfig, MultiheadConfig, ShardingConfig, SparsePatternConfig, build

SEQ, WORDS, WIDTH = 4096, 97, 64


class Layer(nn.Module):
    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), build(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, is_causal=True)[0]


def main() -> None:
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    torch.manual_seed(0)  # the same parameters on all ranks
    window = SparsePatternConfig(pattern_type="local_window", edges="token", local_window_size=255)
    heads, sharding = MultiheadConfig(embed_dim=WIDTH, num_heads=4), ShardingConfig(timeout_s=60)
    local = AttentionConfig(variant="block_sparse", pattern=window, multihead=heads, sharding=sharding)
    dense = AttentionConfig(variant="dense", multihead=heads, sharding=sharding)
    words, places, last = nn.Embedding(WORDS, WIDTH), nn.Embedding(SEQ, WIDTH), nn.Linear(WIDTH, WORDS)
    layers = nn.Sequential(Layer(local), Layer(dense))
    model = nn.ModuleList([words, places, layers, last]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    text = torch.randint(WORDS, (1, SEQ + 1)) // 2 * 2  # labels are shifted before they are shared out
    attention = layers[0].attention
    own, labels = (attention.shard(x).to(device) for x in (text[:, :-1], text[:, 1:]))
    positions = attention.positions(SEQ).to(device)
    for step in range(5):
        logits = last(layers(words(own) + places(positions)))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / SEQ
        optimizer.zero_grad()
        loss.backward()  # on every rank: the others wait for its gradients
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            print(f"step {step}: loss {total:.3f}, {own.shape[1]:,} of {SEQ:,} tokens on this rank")
    dist.barrier()  # no rank ends while gloo's threads still have tensors of its last sum
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
