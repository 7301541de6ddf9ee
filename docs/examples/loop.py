"""A plain training loop: python loop.py BATCH."""

import sys

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main(batch: int) -> None:
    data = TensorDataset(torch.randn(4 * batch, 256, 512))
    layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 6).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for (x,) in DataLoader(data, batch_size=batch, num_workers=2, pin_memory=True):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(x.cuda(non_blocking=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"loss {loss.item():.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
