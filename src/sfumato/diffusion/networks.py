"""Networks by name, built from diffusers' UNet2DModel so that stock diffusers loads what we save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sfumato.errors import InputError

NORM_GROUPS = 8
ADAPTIVE_EMBEDDING = 128


@dataclass(frozen=True)
class Size:
    """Channel widths from the finest level down, residual blocks per level, attention at the coarsest level.

    adaptive: noise level and label scale and shift the features of every block, through an embedding of at
    least 128; otherwise they shift them only, as in the published network.
    """

    widths: tuple[int, ...]
    blocks: int = 1
    attention: bool = False
    adaptive: bool = False


SIZES = {
    "tiny": Size((16, 32, 32)),
    "tiny-adaptive": Size((16, 32, 32), adaptive=True),
    "small": Size((24, 48, 64)),
    "medium": Size((32, 64, 64)),
    "paper": Size((32, 64, 64), blocks=2, attention=True),
    "large": Size((64, 128, 128), blocks=2, attention=True),
}


def unet(name: str, *, size: tuple[int, int], channels: int, num_labels: int) -> Any:
    """A UNet2DModel for images [R, channels, *size] with `num_labels` labels and one more for "no label".

    Each level halves the image, so a level is dropped where the side is odd: 28 pixels take three levels,
    14 two. Convolutions, group norms, linear layers and embeddings only: no layer mixes images.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    if name not in SIZES:
        raise InputError(f"unknown network {name!r}: choose one of {', '.join(SIZES)}")
    chosen = SIZES[name]
    levels = 1
    while levels < len(chosen.widths) and all(side % 2**levels == 0 for side in size):
        levels += 1
    if min(size) < 4:
        raise InputError(f"images of {size[0]}x{size[1]} pixels are too small: 4 is the least (--size)")
    widths = chosen.widths[:levels]
    attention = [chosen.attention and level == levels - 1 for level in range(levels)]
    return UNet2DModel(
        sample_size=size[0] if size[0] == size[1] else size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=chosen.blocks,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attention),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)),
        add_attention=chosen.attention,
        norm_num_groups=NORM_GROUPS,
        time_embedding_dim=max(ADAPTIVE_EMBEDDING, 4 * widths[0]) if chosen.adaptive else None,
        resnet_time_scale_shift="scale_shift" if chosen.adaptive else "default",
        num_class_embeds=num_labels + 1,
    )


def parameter_count(network: Any) -> int:
    """How many numbers training changes."""
    return sum(p.numel() for p in network.parameters() if p.requires_grad)
