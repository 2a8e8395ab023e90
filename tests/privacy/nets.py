"""Small networks, rows and losses shared by the tests of the gradient engines."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn


def unet(*, attention: bool = False, labels: int | None = 5, size: int = 8, **more) -> UNet2DModel:
    torch.manual_seed(0)
    last = "Attn" if attention else ""
    settings = {
        "sample_size": size,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", f"{last}DownBlock2D"),
        "up_block_types": (f"{last}UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 4,
        "num_class_embeds": labels,
        "add_attention": attention,
        "attention_head_dim": 4,
    }
    net = UNet2DModel(**(settings | more))
    with torch.no_grad():  # no layer at zero, so that nothing hides
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def unet_rows(units: int, per_unit: int, *, size: int = 8, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (units, per_unit, 1, size, size)
    return {
        "x": torch.randn(shape, generator=generator),
        "target": torch.randn(shape, generator=generator),
        "t": torch.rand((units, per_unit), generator=generator),
        "y": torch.randint(0, 5, (units, per_unit), generator=generator),
    }


def unet_loss(call, rows) -> Tensor:
    labelled = getattr(call, "class_embedding", True) is not None
    out = call(rows["x"], rows["t"], class_labels=rows["y"] if labelled else None).sample
    return (out - rows["target"]).square().mean((1, 2, 3))


def unlabelled_loss(call, rows) -> Tensor:
    return (call(rows["x"], rows["t"]).sample - rows["target"]).square().mean((1, 2, 3))


class Mixed(nn.Module):
    """Every layer the fast engine knows, a reused one, an in-place activation, odd strides and pads."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(1, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2))
        self.second = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=groups, bias=False)
        self.point = nn.Conv2d(4, 6, 1)
        self.norm = nn.GroupNorm(2, 6)
        self.words = nn.Embedding(7, 6)
        self.twice = nn.Linear(6, 6)
        self.layer_norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 1, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor, words: Tensor) -> Tensor:
        h = nn.functional.relu(self.first(x), inplace=True)
        h = self.norm(self.point(self.second(h)))
        h = h.flatten(2).transpose(1, 2)  # [R, positions, 6], not contiguous
        h = self.twice(torch.tanh(self.twice(h + self.words(words))))
        return self.last(self.layer_norm(h)).mean((1, 2))


def mixed_rows(units: int, per_unit: int, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn((units, per_unit, 1, 7, 9), generator=generator),
        "words": torch.randint(0, 7, (units, per_unit, 1), generator=generator),
    }


def mixed_loss(call, rows) -> Tensor:
    return (call(rows["x"], rows["words"]) - 1).square()
