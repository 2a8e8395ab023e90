"""Per-unit gradients from one ordinary backward pass.

Weights do not ask autograd for their gradient. Instead each layer's input is kept in the forward pass, and
when the gradient at its output arrives in the backward pass, the gradient of every unit's weights is formed
from the two at once: [U, *weight shape], summed over the unit's K rows and all positions. Nothing of size
[U * K, P] exists. Both tensors are read by their logical dimensions, so memory formats (channels_last,
transposed attention tensors) do not matter.

Layers: Conv2d, Linear, GroupNorm, LayerNorm, Embedding. A layer may be used several times in one forward
pass. `Unsupported` is raised, before anything private is derived, for a network with any other trainable
parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Wanted = frozenset[str]  # names of the layer's own parameters that are trained
Formed = Iterable[tuple[str, Tensor]]  # (name of the layer's own parameter, gradient [U, *shape])
# (layer, its wanted parameters, U, its input, the gradient at its output) -> gradients
Form = Callable[[Any, Wanted, int, Tensor, Tensor], Formed]

# Measured on CPU: from this many positions in a unit, one convolution call per unit beats one product for
# all units.
POSITIONS_FOR_ONE_CALL_PER_UNIT = 192


class Unsupported(Exception):
    """The network holds trainable parameters this engine cannot cover."""


def fast_gradients(
    net: nn.Module, losses: Callable[[], Tensor], units: int, per_unit: int
) -> dict[str, Tensor]:
    """{name: [U, *shape]}: gradients of `losses()` [U], which runs `net` on U*K rows, unit by unit."""
    names = {id(p): name for name, p in net.named_parameters() if p.requires_grad}
    layers = _covered_layers(net, names)
    parameters = [p for p in net.parameters() if p.requires_grad]
    gradients: dict[str, Tensor] = {}
    used: set[nn.Module] = set()

    def keep(wanted: Wanted, form: Form, layer: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            raise Unsupported(f"{type(layer).__name__} runs without gradients inside the loss")
        if not args:
            raise Unsupported(f"a {type(layer).__name__} is called by keyword")
        value: Tensor = args[0]
        if value.shape[:1] != (units * per_unit,) or output.shape[:1] != (units * per_unit,):
            raise Unsupported(f"the input of a {type(layer).__name__} is not one entry per row")
        used.add(layer)
        value = value.detach()
        version = value._version
        if not output.requires_grad:  # first layers: give the backward pass something to arrive at
            output = output.requires_grad_().clone()

        def arrived(at_output: Tensor) -> None:
            nonlocal value
            if value._version != version:
                raise Unsupported(f"the input of a {type(layer).__name__} is changed in place")
            with torch.no_grad():
                for own_name, gradient in form(layer, wanted, units, value, at_output):
                    name = names[id(getattr(layer, own_name))]
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            value = value.new_empty(0)  # free the activation as soon as it has been used

        output.register_hook(arrived)
        return output

    handles = [layer.register_forward_hook(partial(keep, wanted, form)) for layer, wanted, form in layers]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            total = losses().sum()
            if len(used) != len(layers):
                raise Unsupported("a trainable layer takes no part in the loss")
            total.backward()
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad and name not in gradients:  # the output took no part in the loss
            gradients[name] = parameter.new_zeros((units, *parameter.shape))
    return {name: gradients[name] for name in names.values()}


def _covered_layers(net: nn.Module, names: dict[int, str]) -> list[tuple[nn.Module, Wanted, Form]]:
    """The layers that own trainable parameters, and their rules; Unsupported if some have no such owner."""
    layers: list[tuple[nn.Module, Wanted, Form]] = []
    owned: list[int] = []
    for layer in net.modules():
        own = {name: p for name, p in layer.named_parameters(recurse=False) if p.requires_grad}
        if not own:
            continue
        form = _RULES.get(type(layer))  # the exact type: a subclass may compute something else
        if (
            form is None
            or layer._forward_hooks
            or layer._forward_pre_hooks
            or hasattr(layer, "parametrizations")
        ):
            raise Unsupported(f"no rule for the parameters of {type(layer).__name__}")
        if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
            raise Unsupported("a convolution pads with something else than zeros")
        if isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
            raise Unsupported("a convolution names its padding")
        if isinstance(layer, nn.Embedding) and (
            layer.padding_idx is not None
            or layer.max_norm is not None
            or layer.scale_grad_by_freq
            or layer.sparse
        ):
            raise Unsupported("an embedding treats some entries specially")
        layers.append((layer, frozenset(own), form))
        owned += [id(p) for p in own.values()]
    if len(owned) != len(set(owned)):
        raise Unsupported("two layers share a parameter")
    if set(owned) != set(names):
        raise Unsupported("a parameter belongs to no layer")
    return layers


def _conv2d(layer: nn.Conv2d, wanted: Wanted, units: int, value: Tensor, at_output: Tensor) -> Formed:
    """dW[u] = sum over the unit's rows and positions of (gradient at output) x (input patch)."""
    weight = layer.weight
    rows, out = at_output.shape[0], weight.shape[0]
    per_unit, positions = rows // units, at_output[0, 0].numel()
    if "bias" in wanted:
        yield "bias", at_output.sum((2, 3)).view(units, per_unit, out).sum(1)
    if "weight" not in wanted:
        return
    on_cpu = value.device.type == "cpu"
    if weight.shape[2:] == (1, 1) and value.shape[2:] == at_output.shape[2:] and layer.groups == 1:
        inputs = value.reshape(units, per_unit, -1, positions).transpose(2, 3)
        errors = at_output.reshape(units, per_unit, out, positions)
        product = torch.bmm(errors[:, 0], inputs[:, 0])
        for row in range(1, per_unit):
            product.baddbmm_(errors[:, row], inputs[:, row])
        yield "weight", product.view(units, *weight.shape)
        return
    if layer.groups != 1 or (on_cpu and per_unit * positions >= POSITIONS_FOR_ONE_CALL_PER_UNIT):
        gradient = weight.new_empty((units, *weight.shape))
        for unit in range(units):
            these = slice(unit * per_unit, (unit + 1) * per_unit)
            gradient[unit] = torch.ops.aten.convolution_backward(
                at_output[these], value[these], weight, None, layer.stride, layer.padding, layer.dilation,
                False, [0, 0], layer.groups, [False, True, False],
            )[1]  # fmt: skip
        yield "weight", gradient
        return
    patches = _patches(layer, value, at_output.shape[2:]).reshape(units, per_unit * positions, -1)
    errors = at_output.permute(0, 2, 3, 1).reshape(units, per_unit * positions, out)
    product = torch.bmm(errors.transpose(1, 2), patches)
    kernel_height, kernel_width = weight.shape[2:]
    yield "weight", product.view(units, out, kernel_height, kernel_width, -1).permute(0, 1, 4, 2, 3)


def _patches(layer: nn.Conv2d, value: Tensor, out_size: torch.Size) -> Tensor:
    """What each output position sees: a view [N, out height, out width, *kernel, channels]."""
    (pad_y, pad_x), (step_y, step_x), (gap_y, gap_x) = _sizes(layer)
    last = value.permute(0, 2, 3, 1)
    last = F.pad(last, (0, 0, pad_x, pad_x, pad_y, pad_y)) if pad_x or pad_y else last.contiguous()
    to_row, to_y, to_x, to_channel = last.stride()
    return last.as_strided(
        (value.shape[0], *out_size, *layer.kernel_size, value.shape[1]),
        (to_row, to_y * step_y, to_x * step_x, to_y * gap_y, to_x * gap_x, to_channel),
    )


def _sizes(layer: nn.Conv2d) -> tuple[tuple[int, int], ...]:
    """Padding, stride and dilation, each (vertical, horizontal)."""
    both = (layer.padding, layer.stride, layer.dilation)
    return tuple((int(vertical), int(horizontal)) for vertical, horizontal in both)


def _linear(layer: nn.Linear, wanted: Wanted, units: int, value: Tensor, at_output: Tensor) -> Formed:
    errors = at_output.reshape(units, -1, layer.out_features)
    if "bias" in wanted:
        yield "bias", errors.sum(1)
    if "weight" in wanted:
        yield "weight", torch.bmm(errors.transpose(1, 2), value.reshape(units, -1, layer.in_features))


def _group_norm(layer: nn.GroupNorm, wanted: Wanted, units: int, value: Tensor, at_output: Tensor) -> Formed:
    normed = F.group_norm(value, layer.num_groups, eps=layer.eps)
    errors, normed = (
        x.reshape(units, -1, layer.num_channels, value[0, 0].numel()) for x in (at_output, normed)
    )
    if "weight" in wanted:
        yield "weight", (errors * normed).sum((1, 3))
    if "bias" in wanted:
        yield "bias", errors.sum((1, 3))


def _layer_norm(layer: nn.LayerNorm, wanted: Wanted, units: int, value: Tensor, at_output: Tensor) -> Formed:
    normed = F.layer_norm(value, layer.normalized_shape, eps=layer.eps)
    errors, normed = (x.reshape(units, -1, *layer.normalized_shape) for x in (at_output, normed))
    if "weight" in wanted:
        yield "weight", (errors * normed).sum(1)
    if "bias" in wanted:
        yield "bias", errors.sum(1)


def _embedding(layer: nn.Embedding, wanted: Wanted, units: int, value: Tensor, at_output: Tensor) -> Formed:
    entries, width = layer.weight.shape
    gradient = at_output.new_zeros((units * entries, width))
    first = torch.arange(units, device=value.device).unsqueeze(1) * entries
    gradient.index_add_(0, (value.reshape(units, -1) + first).flatten(), at_output.reshape(-1, width))
    yield "weight", gradient.view(units, entries, width)


_RULES: dict[type[nn.Module], Form] = {
    nn.Conv2d: _conv2d,
    nn.Linear: _linear,
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.Embedding: _embedding,
}
