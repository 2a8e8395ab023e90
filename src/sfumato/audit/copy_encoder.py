"""An encoder for copies of the owner's own images, trained on them without labels.

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) between two changed views of one image, in the form
of SimCLR (Chen et al. 2020, arXiv 2002.05709, equation 1), as copy detection uses it (Pizzi et al. 2022, SSCD, arXiv
2202.10261). No privacy guarantee: the encoder has seen private images and is for `internal/` only.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.audit.matching import check_image_sets
from sfumato.audit.similarity import FLIPS, NOTHING_AUDITED, Extractor, FeatureExtractor
from sfumato.data.files import write_whole
from sfumato.data.records import fingerprint
from sfumato.encoders.classifier import to_float
from sfumato.encoders.encoder import device
from sfumato.errors import InputError
from sfumato.progress import Progress

STEPS = 350
CODE = "sfumato-copy-encoder/1"  # part of the identity: change it whenever features change
DIMENSION = 128
SIDE = 32  # pixels
_BATCH, _LR, _TEMPERATURE = 128, 3e-3, 0.07
_AT_ONCE = 500


class CopyNetwork(nn.Module):
    """Three convolutions and a projection: float [B, C, H, W] in [-1, 1] -> [B, DIMENSION], each image for itself.

    Images are resized to `SIDE` by `SIDE` pixels first.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 48, 8, 4, 2), nn.GroupNorm(4, 48), nn.SiLU(),
            nn.Conv2d(48, 96, 4, 2, 1), nn.GroupNorm(4, 96), nn.SiLU(),
            nn.Conv2d(96, 96, 3, 1, 1), nn.GroupNorm(4, 96), nn.SiLU(),
            nn.Flatten(), nn.Linear(96 * 16, DIMENSION),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (SIDE, SIDE):
            x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        return self.body(x)


def views(x: Tensor, generator: torch.Generator) -> Tensor:
    """One changed view of each image float [B, C, H, W] in [-1, 1]: what a generator does to a picture it repeats.

    Flipped or not, enlarged by up to a tenth and shifted by up to a thirteenth of a side (edges repeated), blurred by
    up to 3 by 3 pixels, contrast 0.75 to 1.25, brightness +-0.2, Gaussian noise of deviation up to 0.25.
    """

    def draw(low: float, high: float) -> Tensor:
        drawn = torch.rand(len(x), 1, 1, 1, generator=generator)
        return (low + (high - low) * drawn).to(x)

    flip = torch.where(draw(-1, 1) < 0, -1.0, 1.0).flatten()
    scale, zero = draw(0.9, 1.0).flatten(), torch.zeros_like(flip)
    right, down = (draw(-0.15, 0.15).flatten() for _ in range(2))  # of half a side
    change = torch.stack([flip * scale, zero, right, zero, scale, down], 1).unflatten(1, (2, 3))
    grid = F.affine_grid(change, list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, draw(0, 1))
    x = x * draw(0.75, 1.25) + draw(-0.2, 0.2)
    return x + draw(0, 0.25) * torch.randn(x.shape, generator=generator).to(x)


def train_copy_encoder(
    train: np.ndarray, holdout: np.ndarray, *, steps: int = STEPS, seed: int = 0, saved: Path
) -> Extractor:
    """The extractor "copy", trained on all images of both sets, uint8 [N, H, W, C] and [M, H, W, C], by cosine.

    The encoder is a function of the union as a set: images are put into an order of their own (by hash, equal ones
    once) and all are drawn equally often. So it cannot know which image was whose: with nothing memorised, matches
    with training and with held-out images remain exchangeable. An encoder that had seen the training images alone
    would tell the two apart by itself. Images that took part are pushed away from each other a little, unlike fresh
    ones: compare generated images with both sets by the same encoder, as `calibration.excess` does.

    saved: the safetensors file; if it is there and was made from these images with these settings, it is used as it
    is. seed: of weights, batches and views; public randomness. Deterministic on one machine and number of threads.

    InputError for sets without images or of different shapes, fewer than two different images, fewer than one step,
    or a file of something else.
    """
    check_image_sets(train=train, holdout=holdout)
    if steps < 1:
        raise InputError(f"{steps} steps train no copy encoder; {NOTHING_AUDITED}; give 1 or more")
    images, digests = _union(train, holdout)
    if len(images) < 2:
        raise InputError(
            f"the training and held-out images are all one picture; {NOTHING_AUDITED}; give images that differ"
        )
    about = {"format": CODE, "images": fingerprint(digests), "steps": steps, "seed": seed}
    network = _seeded(images.shape[3], seed)
    if saved.exists():
        _load(network, saved, about)
    else:
        _train(network, images, steps, seed)
        weights = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
        try:
            saved.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(saved, save(weights, metadata={"sfumato": json.dumps(about)}))
        except OSError as error:
            raise InputError(
                f"'{saved}' cannot be written ({error.strerror}); {NOTHING_AUDITED}; free space or choose another --out"
            ) from None
    return _extractor(network)


def _train(network: CopyNetwork, images: np.ndarray, steps: int, seed: int) -> None:
    """AdamW with one cycle of the learning rate; batches run through the images in a new order each time."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_LR, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LR, total_steps=steps)
    order, batch = torch.zeros(0, dtype=torch.int64), min(_BATCH, len(images))
    network.train()
    with Progress("copy encoder", steps, "steps") as progress:
        for _ in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(images), generator=generator)
            rows, order = order[:batch], order[batch:]
            x = to_float(images[rows.numpy()]).to(device())
            first, second = (F.normalize(network(views(x, generator))) for _ in range(2))
            loss = contrastive_loss(first, second)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(1, note=f"loss {loss.item():.2f}")
    network.eval()


def contrastive_loss(first: Tensor, second: Tensor) -> Tensor:
    """SimCLR's equation 1 averaged over both views of B images, unit vectors [B, D]: each view has to find the other
    one of its image among the 2B - 2 views of the other images."""
    both = torch.cat([first, second])
    logits = (both @ both.T / _TEMPERATURE).fill_diagonal_(-torch.inf)
    return F.cross_entropy(logits, torch.arange(len(both), device=both.device).roll(len(first)))


def _union(train: np.ndarray, holdout: np.ndarray) -> tuple[np.ndarray, list[bytes]]:
    """Both sets in the order of their digests, equal images once, and the digests."""
    found: dict[bytes, tuple[np.ndarray, int]] = {}
    for images in (train, holdout):
        for row in range(len(images)):
            found[hashlib.sha256(np.asarray(images[row]).tobytes()).digest()] = images, row
    digests = sorted(found)
    places = (found[digest] for digest in digests)
    return np.stack([np.asarray(images[row]) for images, row in places]), digests


def _seeded(channels: int, seed: int) -> CopyNetwork:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CopyNetwork(channels).to(device()).eval()


def _load(network: CopyNetwork, path: Path, about: dict[str, Any]) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            found = json.loads((file.metadata() or {}).get("sfumato", "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if found == about:
            network.load_state_dict(weights)
            return
        ours = found.get("format") == CODE
        problem = "was made from other images, or with other steps or seed" if ours else "is no copy encoder"
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        problem = f"cannot be read as a copy encoder ({type(error).__name__})"
    raise InputError(f"'{path}' {problem}; {NOTHING_AUDITED}; delete it or choose another --out")


def _extractor(network: CopyNetwork) -> FeatureExtractor:
    said = f"[-1, 1], resized to {SIDE} by {SIDE} (bilinear)"
    state = network.state_dict()
    identity = fingerprint([CODE, said, *(part for name in state for part in (name, _bytes(state[name])))])

    @torch.inference_mode()
    def encode(images: np.ndarray) -> np.ndarray:
        parts = [to_float(images[i : i + _AT_ONCE]).to(device()) for i in range(0, len(images), _AT_ONCE)]
        return np.concatenate([network(part).cpu().numpy() for part in parts])

    return FeatureExtractor("copy", identity, said, "cosine", FLIPS, encode)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()
