import pytest
import torch

from sfumato.diffusion.networks import SIZES, parameter_count, unet
from sfumato.errors import InputError


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [(28, 28), (16, 24), (7, 7)])
def test_output_has_the_shape_of_the_input(name, size):
    net = unet(name, size=size, channels=1, num_labels=2)
    x = torch.randn(1, 1, *size)
    out = net(x, torch.zeros(1), class_labels=torch.tensor([2]), return_dict=False)[0]
    assert out.shape == x.shape


def test_paper_size_has_the_published_number_of_parameters():
    """PrivImage, section 5: 1.75 M at 32x32; ours follows its widths (32, 64, 64), two blocks, attention at 8."""
    count = parameter_count(unet("paper", size=(32, 32), channels=3, num_labels=10))
    assert count == pytest.approx(1.75e6, rel=0.15)


def test_no_layer_mixes_images():
    kinds = {type(m).__name__ for m in unet("paper", size=(28, 28), channels=1, num_labels=2).modules()}
    assert not {kind for kind in kinds if "BatchNorm" in kind or "InstanceNorm" in kind}


def test_unknown_name_and_tiny_images_are_refused():
    with pytest.raises(InputError, match="choose one of"):
        unet("huge", size=(28, 28), channels=1, num_labels=2)
    with pytest.raises(InputError, match="--size"):
        unet("tiny", size=(2, 2), channels=1, num_labels=2)
