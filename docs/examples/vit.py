"""Two training steps of a vision transformer: python vit.py BATCH."""

import sys

import torch
from torchvision.models import vit_b_16


def main(batch: int) -> None:
    model = vit_b_16().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        images = torch.randn(batch, 3, 224, 224, device="cuda")
        labels = torch.randint(0, 1000, (batch,), device="cuda")
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main(int(sys.argv[1]))
