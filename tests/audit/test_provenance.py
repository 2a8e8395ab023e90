import copy

import numpy as np
import torch
from torch import nn

from sfumato.audit.provenance import content_of, identity_of, weights_of
from sfumato.audit.target import GeneratorModel
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler


def test_content_is_of_every_pixel_shape_and_order():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1)).astype(np.uint8)
    changed = images.copy()
    changed[3, 2, 1, 0] ^= 1
    found = [content_of(x, "test") for x in (images, changed, images[::-1], images.reshape(5, 2, 8, 1))]
    assert len(set(found)) == 4 and content_of(images.copy(), "test") == found[0]


def test_weights_are_told_apart_by_value_name_and_type():
    one = nn.Linear(3, 2)
    other = copy.deepcopy(one)
    assert weights_of(one) == weights_of(other)
    with torch.no_grad():
        other.bias[1] += 1e-6
    assert weights_of(one) != weights_of(other)
    assert weights_of(one) != weights_of(nn.ModuleDict({"a": one}))
    assert weights_of(one) != weights_of(copy.deepcopy(one).to(torch.bfloat16))


def test_a_model_is_also_how_it_is_drawn_from(tmp_path):
    torch.manual_seed(0)
    generator = Generator(
        unet("tiny", size=(8, 8), channels=1, num_labels=2), ("a", "b"), sampler=Sampler(steps=4)
    )
    generator.save_pretrained(tmp_path)
    first = identity_of(GeneratorModel(generator))
    assert identity_of(GeneratorModel(Generator.from_pretrained(tmp_path))) == first
    for changed in (generator.with_sampling(guidance=2.0), generator.with_sampling(sampler=Sampler(steps=5))):
        assert identity_of(GeneratorModel(changed)) != first
