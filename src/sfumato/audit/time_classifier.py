"""A classifier of noisy images at every noise level, whose gradient steers a diffusion model (SIDE, arXiv 2410.02467).

p(y | x, sigma) for x = image + sigma n, in EDM coordinates (Karras et al. 2022, arXiv 2206.00364). The images are in
[-1, 1]. No layer mixes the images of a batch, so each image's gradient is its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.audit.guidance import Gradient
from sfumato.audit.provenance import content_of
from sfumato.data.files import write_whole
from sfumato.data.records import fingerprint
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import to_float
from sfumato.diffusion.training import rate
from sfumato.errors import InputError
from sfumato.progress import Progress

CODE = "sfumato-time-classifier/1"  # part of every fingerprint: change it whenever the same call learns otherwise
CANDIDATES = 4_096  # images at a time that a noisy image may have come from
_WIDTHS, _TIME, _GROUPS, _GRID = (32, 64, 128), 64, 8, 4
_EDM = EDM()
_DROWNED = 5.0  # logits shrink as 1 / sigma above this level, as those of Gaussians do that noise drowns
_CENTRE, _SPREAD = 0.3, 1.5  # of ln(sigma): where noisy images begin to be told apart


class _Block(nn.Module):
    """Two convolutions beside a shortcut; ln(sigma) / 4 scales and shifts the features after the first norm."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(_GROUPS, out)
        self.time = nn.Linear(_TIME, 2 * out)
        self.second, self.second_norm = nn.Conv2d(out, out, 3, 1, 1), nn.GroupNorm(_GROUPS, out)
        self.shortcut = nn.Conv2d(channels, out, 1, stride)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.time(time)[:, :, None, None].chunk(2, 1)
        h = F.silu(self.first_norm(self.first(x)) * (1 + scale) + shift)
        return F.silu(self.second_norm(self.second(h)) + self.shortcut(x))


class TimeClassifier(nn.Module):
    """log p(y | x, sigma): a ResNet of seven convolutions with group norms, and a noise level in every block.

    size: (H, W) of the images, 4 pixels or more. The larger they are, the coarser the first convolution looks
    (stride 1 below 24 pixels, 2 below 96, else 4), so that the cost of a gradient grows slower than the image.

    trained_on: hexadecimal SHA-256 of the pixels it was trained on (`content_of`), "" before training.
    """

    def __init__(self, size: tuple[int, int], channels: int, num_classes: int) -> None:
        super().__init__()
        stride = 1 if max(size) < 24 else 2 if max(size) < 96 else 4
        self.stem = nn.Conv2d(channels, _WIDTHS[0], 2 * stride + 1, stride, stride)
        self.time = nn.Sequential(nn.Linear(1, _TIME), nn.SiLU(), nn.Linear(_TIME, _TIME), nn.SiLU())
        self.blocks = nn.ModuleList(
            [_Block(a, b, s) for a, b, s in zip((_WIDTHS[0], *_WIDTHS), _WIDTHS, (2, 2, 1), strict=False)]
        )
        self.head = nn.Linear(_WIDTHS[-1] * _GRID**2, num_classes)
        self.num_classes = num_classes
        self.trained_on = ""

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Logits [R, num_classes] of x [R, C, H, W] = image + sigma * noise at noise levels sigma [R]."""
        c_in = (sigma**2 + _EDM.sigma_data**2).rsqrt()  # EDM, table 1
        time = self.time((sigma.log() / 4)[:, None])
        h = self.stem(c_in[:, None, None, None] * x)
        for block in self.blocks:
            h = block(h, time)
        h = F.adaptive_avg_pool2d(h, _GRID).flatten(1)
        return self.head(h) * (1 + (sigma / _DROWNED) ** 2).rsqrt()[:, None]

    def gradient(self, conditions: np.ndarray) -> Gradient:
        """grad_x log p(c_row | x, sigma) for the wanted class of each image of a sampling call (int64 [N])."""
        wanted = torch.from_numpy(np.asarray(conditions, np.int64))
        if len(wanted) == 0 or int(wanted.min()) < 0 or int(wanted.max()) >= self.num_classes:
            raise ValueError(f"conditions must be classes from 0 to {self.num_classes - 1}")

        def gradient(x: Tensor, sigma: Tensor, rows: np.ndarray) -> Tensor:
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                log_p = self(x, sigma).log_softmax(1)
                chosen = log_p.gather(1, wanted[torch.from_numpy(rows)].to(x.device)[:, None])
                return torch.autograd.grad(chosen.sum(), x)[0]

        return gradient


def draw_sigma(rows: int, sigma_range: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Noise levels to train at, [rows]: a tenth log-uniform over the target's range, the others log-normal in it.

    The log-normal lies higher than the one that EDM trains denoisers with: the fine details of little noise say
    nothing new about the class, and much noise says nothing at all.
    """
    low, high = sigma_range
    uniform = low * (high / low) ** torch.rand(rows, generator=generator, device=generator.device)
    normal = EDM(P_mean=_CENTRE, P_std=_SPREAD).draw_sigma(rows, generator)
    anywhere = torch.rand(rows, generator=generator, device=generator.device) < 0.1
    return torch.where(anywhere, uniform, normal).clamp(low, high)


def posterior(x: Tensor, sigma: Tensor, images: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """p(y | x, sigma) when the clean image is one of `images`, each as likely: float [R, num_classes].

    x: [R, C, H, W] = image + sigma * noise. images: [N, C, H, W] with labels int64 [N]. What cross-entropy with the
    label of the noised image learns on average, without the chance of the draw (Bayes' rule with Gaussian noise).
    """
    flat, rows = images.flatten(1), x.flatten(1)
    squared = rows.square().sum(1)[:, None] + flat.square().sum(1) - 2 * rows @ flat.T
    weights = (-squared / (2 * sigma[:, None] ** 2)).softmax(1)
    return torch.zeros(len(x), num_classes, device=x.device).index_add_(1, labels, weights)


def train_time_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    steps: int,
    seed: int,
    sigma_range: tuple[float, float],
    batch: int = 128,
    lr: float = 1e-4,
    device: torch.device | str = "cpu",
    description: str = "time classifier",
    saved: Path | None = None,
) -> TimeClassifier:
    """Learn p(y | image + sigma n, sigma) from images (uint8 [N, H, W, C]) and labels (int64 [N]); eval mode.

    AdamW (the paper's; 1e-4) with a warm-up and a cosine decay to a tenth; each image of a batch has its own noise
    level (`draw_sigma`). The target is the class's `posterior` among the images (a sample of 4,096 of more), which
    has the same minimum as the label and far less variance: guidance needs the gradient, not the winner.

    seed: everything that is random. saved: a safetensors file; if it holds what the same call learnt before, that is
    returned, else it is written.

    Guarantee: none. Of private images it is as private as they are, and belongs under `internal/`.

    Raises:
        InputError: fewer than two classes, no images, or a label out of range.
    """
    labels = np.asarray(labels, np.int64)
    if num_classes < 2 or len(images) == 0 or len(labels) != len(images):
        raise InputError(
            f"{description}: {len(images)} images, {len(labels)} labels and {num_classes} classes teach nothing; "
            "nothing was audited; give labelled images of two classes or more"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"{description}: labels must be 0 to {num_classes - 1}, found {labels.min()} to {labels.max()}; "
            "nothing was audited"
        )
    trained_on = content_of(images, f"{description}: checking")
    settings = [steps, seed, *sigma_range, batch, lr, num_classes]
    key = fingerprint([CODE, trained_on, labels.tobytes(), json.dumps(settings)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = TimeClassifier((images.shape[1], images.shape[2]), images.shape[3], num_classes)
    classifier.to(device)
    if saved is None or not _load(classifier, saved, key):
        _train(classifier, images, labels, settings, description)
        classifier.trained_on = trained_on
        if saved is not None:
            saved.parent.mkdir(parents=True, exist_ok=True)
            tensors = {name: value.cpu().contiguous() for name, value in classifier.state_dict().items()}
            write_whole(saved, save(tensors, {"key": key, "trained_on": trained_on}))
    return classifier.requires_grad_(False).eval()


def _train(
    classifier: TimeClassifier, images: np.ndarray, labels: np.ndarray, settings: list, description: str
) -> None:
    steps, seed, low, high, batch, lr, num_classes = settings
    device = classifier.head.weight.device
    order = np.random.default_rng([seed, 1])
    noise = torch.Generator(device).manual_seed(int(order.integers(2**62)))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    clean, classes = (
        to_float(images[:CANDIDATES]).to(device),
        torch.from_numpy(labels[:CANDIDATES]).to(device),
    )
    classifier.train()
    with Progress(description, steps, "steps") as progress:
        for step in range(steps):
            if len(images) > CANDIDATES:
                among = order.choice(len(images), CANDIDATES, replace=False)
                clean, classes = (
                    to_float(images[among]).to(device),
                    torch.from_numpy(labels[among]).to(device),
                )
            x = clean[torch.from_numpy(order.integers(len(clean), size=batch)).to(device)]
            sigma = draw_sigma(batch, (low, high), noise)
            x = x + sigma[:, None, None, None] * torch.randn(x.shape, generator=noise, device=device)
            loss = F.cross_entropy(classifier(x, sigma), posterior(x, sigma, clean, classes, num_classes))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate(step / steps, step)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress.advance(1, note=f"loss {loss.item():.3f}" if step % 20 == 0 else "")


def _load(classifier: TimeClassifier, saved: Path, key: str) -> bool:
    """Fill the classifier from the file, if that was left by the same call; a damaged file counts as none."""
    if not saved.is_file():
        return False
    try:
        with safe_open(saved, framework="pt") as file:
            about = file.metadata() or {}
            if about.get("key") != key:
                return False
            classifier.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
            classifier.trained_on = about["trained_on"]
    except (SafetensorError, OSError, KeyError, RuntimeError):
        return False
    return True
