"""Before any private step: is what will be clipped really the gradient of one unit, and of one unit only?

Published engines fail this on ordinary diffusion networks (wrong per-unit gradients after attention blocks
or in channels_last), and a clip of something that is not the gradient of one unit bounds nothing. The check
runs on random public inputs, on a copy of the network whose weights are moved a little so that layers
initialised to zero cannot hide an error, in the dtype, memory format and mode that will be used.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from sfumato.errors import InputError
from sfumato.privacy.clipping import clipped_gradient_sum, unit_norms
from sfumato.privacy.per_unit import (
    Engine,
    RowLoss,
    Rows,
    per_unit_gradients,
    rows_shape,
    trainable,
    unit_losses,
)

LARGEST_ERROR = 1e-3
LARGEST_MIXING = 1e-5
# A parameter's error counts relative to its own gradient plus this share of the whole gradient.
SMALL_PARAMETER = 1e-2


@dataclass(frozen=True)
class SelfCheck:
    """What was found. `max_rel_error`: norms, gradients and clipped sum against one backward pass per unit.

    `max_mixing`: relative change of a unit's loss or gradient when another unit's rows change.
    """

    engine: str
    max_rel_error: float
    max_mixing: float

    @property
    def ok(self) -> bool:
        """Whether private training may start."""
        return self.max_rel_error <= LARGEST_ERROR and self.max_mixing <= LARGEST_MIXING


def selfcheck(net: nn.Module, row_loss: RowLoss, example_rows: Rows, engine: Engine = "fast") -> SelfCheck:
    """Compare `engine` with one backward pass per unit; InputError ("no budget was spent") unless it
    passes.

    `example_rows` [U, K, ...] with U >= 2: public, of the shapes that training will use. `net` is left
    untouched. Refuses: gradients or norms off by more than 1e-3; units that influence each other (BatchNorm
    in training mode, losses normalised over the batch); active dropout, because its draws depend on a
    unit's place in the batch; a forward pass that changes buffers, because they would carry private data
    out without noise.
    """
    units, _ = rows_shape(example_rows)
    if units < 2:
        _refuse("rows of at least 2 units are needed", "give more example rows")
    for name, module in net.named_modules():
        if isinstance(module, _DropoutNd) and module.training and module.p > 0:
            _refuse(f"dropout at {name!r} is active", "set its p to 0 or call .eval() on it")
    checked = _moved(net)
    before = {name: buffer.clone() for name, buffer in checked.named_buffers()}
    mixing = _mixing_of_losses(checked, row_loss, example_rows)
    for name, buffer in checked.named_buffers():
        if not torch.equal(buffer, before[name]):
            _refuse(f"the forward pass changes buffer {name!r}", "use GroupNorm, or .eval() for that layer")
    if not mixing <= LARGEST_MIXING:
        _refuse(
            f"units of a batch influence each other (a unit's loss moves by {mixing:.1e})",
            "replace layers such as BatchNorm by GroupNorm; let row_loss treat rows independently",
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        error = _error(checked, row_loss, example_rows, engine)
        mixing = max(mixing, _mixing_of_gradients(checked, row_loss, example_rows, engine))
    found = SelfCheck(engine, error, mixing)
    if not found.ok:
        _refuse(
            f"engine {engine!r} differs from one backward per unit (error {error:.1e}, mixing {mixing:.1e})",
            "use another engine" if engine != "loop" else "make the loss deterministic and finite",
        )
    return found


def _refuse(what: str, remedy: str) -> None:
    raise InputError(f"selfcheck: {what}; no budget was spent; {remedy}")


def _moved(net: nn.Module) -> nn.Module:
    """A copy of the network with every trainable weight moved by a tenth of its size plus 0.01."""
    checked = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(checked).values():
            step = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(step * (0.1 * parameter.square().mean().sqrt() + 0.01))
    return checked


def _with_first_unit_changed(rows: Rows) -> dict[str, Tensor]:
    """Numbers of unit 0 three times as large, its integers those of the last unit."""
    changed = {name: value.clone() for name, value in rows.items()}
    for value in changed.values():
        value[0] = 3 * value[0] if value.is_floating_point() else value[-1]
    return changed


def _mixing_of_losses(net: nn.Module, row_loss: RowLoss, rows: Rows) -> float:
    with torch.no_grad():
        first, again = (unit_losses(row_loss, net, rows).double() for _ in range(2))
        changed = unit_losses(row_loss, net, _with_first_unit_changed(rows)).double()
    moved = torch.stack([first - again, first - changed])[:, 1:].abs() / first[1:].abs().clamp_min(1e-12)
    return float(moved.max().nan_to_num(float("inf")))


def _mixing_of_gradients(net: nn.Module, row_loss: RowLoss, rows: Rows, engine: Engine) -> float:
    first, changed = (
        _flat(per_unit_gradients(net, row_loss, some, engine))[1:]
        for some in (rows, _with_first_unit_changed(rows))
    )
    moved = (first - changed).norm(dim=1) / first.norm(dim=1).clamp_min(1e-30)
    return float(moved.max().nan_to_num(float("inf")))


def _error(net: nn.Module, row_loss: RowLoss, rows: Rows, engine: Engine) -> float:
    right = per_unit_gradients(net, row_loss, rows, "loop")
    found = per_unit_gradients(net, row_loss, rows, engine)
    norms = unit_norms(right)
    clip_norm = float(norms.median())
    if not 0 < clip_norm < float("inf"):
        return float("inf")
    errors = [((unit_norms(found) - norms).abs() / norms).max()]
    for name, gradient in right.items():
        size = gradient.flatten(1).double().norm(dim=1)
        distance = (found[name].flatten(1).double() - gradient.flatten(1).double()).norm(dim=1)
        errors.append((distance / (size + SMALL_PARAMETER * norms)).max())
    # The path that training takes, with some units clipped and some not, one unit at a time for the
    # comparison.
    total = clipped_gradient_sum(net, row_loss, rows, clip_norm=clip_norm, engine=engine)._values
    factors = (clip_norm / norms).clamp_max(1.0)
    expected = (_flat(right) * factors.unsqueeze(1)).sum(0)
    summed = torch.cat([value.flatten() for value in total.values()]).double()
    errors.append((summed - expected).norm() / expected.norm().clamp_min(1e-30))
    return float(torch.stack([e.double() for e in errors]).max().nan_to_num(float("inf")))


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten(1) for gradient in gradients.values()], dim=1).double()
