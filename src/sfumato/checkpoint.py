"""State of interrupted training: one safetensors file, replaced atomically; no seeds, no counts of the data.

Public training and DP-SGD both keep theirs here. What DP-SGD keeps is made of noised gradients only; it lies
under `internal/` all the same, because it belongs to an unfinished reservation.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sfumato.errors import InputError


class Averaged(Protocol):
    """Running average of the weights, as training uses it."""

    def update(self, net: nn.Module) -> None: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> Any: ...


class WeightAverage:
    """Exponential moving average of the trainable weights with warm-up: decay_t = min(decay, (1 + t) / (10 +
    t)).

    Post-processing of released weights, hence free.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), not {decay}")
        self.decay, self.updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Move the average towards the weights of `net`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        parameters = dict(net.named_parameters())
        for name, average in self.weights.items():
            average.lerp_(parameters[name].detach(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, net: nn.Module) -> None:
        """Write the averaged weights into `net`, in place."""
        parameters = dict(net.named_parameters())
        for name, average in self.weights.items():
            parameters[name].copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """{"updates": int64 scalar, "weights.<name>": tensor}."""
        named = {f"weights.{name}": value for name, value in self.weights.items()}
        return {"updates": torch.tensor(self.updates), **named}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        self.updates = int(state["updates"])
        for name, average in self.weights.items():
            average.copy_(state[f"weights.{name}"])


def save_checkpoint(
    path: Path,
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Averaged | None,
    *,
    owner: str,
    about: dict[str, Any],
) -> None:
    """Write `path`: temporary file, fsync, rename.

    `owner` names the run or reservation the state belongs to; `about` holds small JSON values (steps taken).
    """
    tensors = {f"net.{name}": value for name, value in net.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    state = optimizer.state_dict()
    plain: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                plain.setdefault(str(index), {})[name] = value
    header = {
        "owner": owner, "about": about, "optimizer": {"plain": plain, "param_groups": state["param_groups"]}
    }  # fmt: skip
    tensors = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(save(tensors, metadata={"sfumato": json.dumps(header)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(
    path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, average: Averaged | None, *, owner: str
) -> dict[str, Any]:
    """Restore all three and return `about`; {}, and nothing touched, if there is no file.

    Raises InputError for a file that is damaged, of another owner, or of another network.
    """
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["sfumato"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, about, saved = header["owner"], header["about"], header["optimizer"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}: this checkpoint cannot be read ({type(error).__name__}); no budget was spent now, steps begun "
            "earlier stay spent; delete the file to go on without it"
        ) from error
    if found != owner:
        raise InputError(
            f"{path}: this checkpoint belongs to another run; no budget was spent; choose another --out or delete it"
        )
    state: dict[int, dict[str, Any]] = {
        int(index): dict(entries) for index, entries in saved["plain"].items()
    }
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimizer":
            index, _, entry = rest.partition(".")
            state.setdefault(int(index), {})[entry] = value
    try:
        net.load_state_dict({k[4:]: v for k, v in tensors.items() if k.startswith("net.")})
        optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})
        if average is not None:
            average.load_state_dict({k[8:]: v for k, v in tensors.items() if k.startswith("average.")})
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"{path}: this checkpoint is of another network or optimiser; no budget was spent; "
            "run with the options it was made with, or delete the file"
        ) from error
    return dict(about)
