"""Gradients of single units, by three engines that must agree.

A *unit* is what one neighbouring step adds or removes (one image, or all images of one group). `rows` holds
K rows for each of U units: every tensor in it has shape [U, K, ...]. The gradient of a unit is the gradient
of the *mean* of its K row losses with respect to all trainable parameters; K therefore changes neither
sensitivity nor accounting.

Engines
    "fast"   one backward pass for all units; weight gradients are formed unit by unit in hooks
    (fast_engine.py).
             Falls back to "exact" for a network that has trainable parameters outside the layers it knows.
    "exact"  torch.func.vmap(grad(...)); any network whose operations vmap supports.
    "loop"   one ordinary backward pass per unit; the oracle the other two are compared with.

None of this is private by itself: callers outside `sfumato.privacy` use `clipped_gradient_sum`.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sfumato.errors import InputError
from sfumato.privacy.fast_engine import Unsupported, fast_gradients

Engine = Literal["fast", "exact", "loop"]
Rows = Mapping[str, Tensor]
RowLoss = Callable[[Callable[..., Any], dict[str, Tensor]], Tensor]

PHYSICAL_BATCH_BYTES = 1.5e9
MAX_ROWS_AT_ONCE = 512  # beyond this, larger batches no longer run faster and only fall out of the caches


def trainable(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters a unit's gradient is taken with respect to, each once, in the network's order."""
    return {name: parameter for name, parameter in net.named_parameters() if parameter.requires_grad}


def rows_shape(rows: Rows) -> tuple[int, int]:
    """(U, K) of `rows`; raises InputError when the tensors disagree or K is 0."""
    shapes = {tuple(value.shape[:2]) for value in rows.values()}
    units, per_unit = (*next(iter(shapes), ()), 0, 0)[:2]
    if len(shapes) != 1 or per_unit < 1:
        raise InputError(
            f"rows: every tensor needs the same leading shape [units, rows], found {sorted(shapes)}; "
            "no budget was spent; stack the rows of each unit along dimension 1"
        )
    return units, per_unit


def check_engine(engine: str) -> None:
    """Raise InputError unless `engine` is one of the three."""
    if engine not in get_args(Engine):
        raise InputError(
            f"engine {engine!r} is unknown; no budget was spent; use one of {', '.join(get_args(Engine))}"
        )


def unit_losses(row_loss: RowLoss, call: Callable[..., Any], rows: Rows) -> Tensor:
    """Mean loss of each unit over its K rows, [U]. Rows reach `row_loss` flat, [U*K, ...], unit by unit."""
    units, per_unit = rows_shape(rows)
    losses = row_loss(call, {name: value.flatten(0, 1) for name, value in rows.items()})
    if losses.shape != (units * per_unit,):
        raise InputError(
            f"row_loss returned shape {tuple(losses.shape)} for {units * per_unit} rows; "
            "no budget was spent; return one loss per row"
        )
    return losses.view(units, per_unit).mean(1)


def per_unit_gradients(net: nn.Module, row_loss: RowLoss, rows: Rows, engine: Engine) -> dict[str, Tensor]:
    """Gradient of each unit: {parameter name: [U, *parameter shape]}, all units at once (no physical
    batching).

    The network's parameters, their `requires_grad` and their `.grad` are as before when this returns.
    """
    check_engine(engine)
    units, _ = rows_shape(rows)
    parameters = trainable(net)
    if units == 0:
        return {name: p.new_zeros((0, *p.shape)) for name, p in parameters.items()}
    if engine == "fast" and net not in _NOT_FAST:
        try:
            return fast_gradients(net, lambda: unit_losses(row_loss, net, rows), *rows_shape(rows))
        except Unsupported as reason:
            _NOT_FAST.add(net)
            warnings.warn(f"engine 'fast' gives way to 'exact' for this network: {reason}", stacklevel=2)
    if engine == "loop":
        return _loop(net, row_loss, rows, parameters)
    return _exact(net, row_loss, rows, parameters)


_NOT_FAST: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _loop(
    net: nn.Module, row_loss: RowLoss, rows: Rows, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    gradients = {name: p.new_empty((rows_shape(rows)[0], *p.shape)) for name, p in parameters.items()}
    for unit in range(rows_shape(rows)[0]):
        loss = unit_losses(row_loss, net, {k: v[unit : unit + 1] for k, v in rows.items()}).sum()
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            gradients[name][unit] = 0.0 if gradient is None else gradient
    return gradients


def _exact(
    net: nn.Module, row_loss: RowLoss, rows: Rows, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    detached = {name: p.detach() for name, p in parameters.items()}

    def loss(parameters: dict[str, Tensor], unit: dict[str, Tensor]) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return torch.func.functional_call(net, parameters, args, kwargs)

        return unit_losses(row_loss, call, {k: v.unsqueeze(0) for k, v in unit.items()}).sum()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0), randomness="error")(
            detached, dict(rows)
        )


def units_at_once(net: nn.Module, row_loss: RowLoss, rows: Rows) -> int:
    """How many units to process at once, from an estimate of memory; depends on shapes only, never on
    values.

    One unit needs its gradients (twice: formed and reduced) and the activations autograd keeps for its K
    rows. Those are counted on one row of zeros, once per network and row shape.
    """
    _, per_unit = rows_shape(rows)
    key = tuple((name, tuple(value.shape[2:]), value.dtype) for name, value in sorted(rows.items()))
    known = _ROW_BYTES.setdefault(net, {})
    if key not in known:
        known[key] = _activation_bytes(
            net, row_loss, {k: v.new_zeros((1, 1, *v.shape[2:])) for k, v in rows.items()}
        )
    gradient_bytes = sum(p.numel() * p.element_size() for p in trainable(net).values())
    fits = int(PHYSICAL_BATCH_BYTES // (2 * gradient_bytes + per_unit * known[key] + 1))
    return max(1, min(fits, -(-MAX_ROWS_AT_ONCE // per_unit)))


_ROW_BYTES: weakref.WeakKeyDictionary[nn.Module, dict[Any, int]] = weakref.WeakKeyDictionary()


def _activation_bytes(net: nn.Module, row_loss: RowLoss, one_row: Rows) -> int:
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # keeps storages alive, so that no address is met twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in seen:
            seen[address] = tensor.untyped_storage().nbytes()
            kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unit_losses(row_loss, net, one_row)
    return 2 * sum(seen.values())  # forward values, and about as much again for gradients and work space
