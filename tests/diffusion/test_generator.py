import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, UNet2DModel

from sfumato.diffusion.generator import Generator, to_float, to_uint8
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler
from sfumato.errors import InputError


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    net = unet("tiny", size=(8, 8), channels=1, num_labels=3)
    return Generator(net, ("a", "b", "c"), sampler=Sampler(steps=4), guidance=1.3)


def test_labels_are_equally_frequent_by_default(generator):
    images, labels = generator.generate(8, seed=1)
    assert images.shape == (8, 8, 8, 1) and images.dtype == np.uint8
    assert np.bincount(labels, minlength=3).tolist() == [3, 3, 2]


def test_same_seed_same_images(generator):
    first, again, other = (generator.generate(3, seed=s)[0] for s in (5, 5, 6))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_saved_and_loaded_draws_the_same(generator, tmp_path):
    generator.save_pretrained(tmp_path / "model")
    loaded = Generator.from_pretrained(tmp_path / "model")
    assert loaded.label_names == generator.label_names and loaded.guidance == 1.3
    assert np.array_equal(loaded.generate(4, seed=2)[0], generator.generate(4, seed=2)[0])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "release").mkdir()
    (tmp_path / "model").rename(tmp_path / "run" / "release" / "model")
    assert Generator.from_pretrained(tmp_path / "run").size == (8, 8)


def test_stock_diffusers_loads_network_and_scheduler(generator, tmp_path):
    generator.save_pretrained(tmp_path)
    stock = UNet2DModel.from_pretrained(tmp_path)
    x = torch.randn(2, 1, 8, 8)
    given = {"class_labels": torch.tensor([0, 3]), "return_dict": False}
    ours = generator.network.eval()(x, torch.tensor([0.1, 0.2]), **given)[0]
    torch.testing.assert_close(stock(x, torch.tensor([0.1, 0.2]), **given)[0], ours)
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert scheduler.config.sigma_data == generator.edm.sigma_data
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.pt"))


@pytest.mark.parametrize(
    "call", [{"num_images": 0}, {"num_images": 2, "labels": [0]}, {"num_images": 1, "labels": [3]}]
)
def test_impossible_requests_are_refused(generator, call):
    with pytest.raises(InputError):
        generator.generate(**call)


def test_missing_or_damaged_models_are_refused(generator, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Generator.from_pretrained(tmp_path / "nowhere" / "deep" / "model")
    with pytest.raises(InputError, match="holds no generator"):
        Generator.from_pretrained(tmp_path)
    generator.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "sfumato.json").write_text("{}")
    with pytest.raises(InputError, match="complete"):
        Generator.from_pretrained(tmp_path / "m")


def test_pixels_survive_the_way_to_floats_and_back():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    assert np.array_equal(to_uint8(to_float(images)), images)
    assert to_uint8(torch.full((1, 1, 1, 1), 9.0)).item() == 255
