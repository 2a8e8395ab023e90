"""What the user types is opened as what it is, and a model folder that holds pickle is not opened at all."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image

from sfumato.audit import target as module
from sfumato.audit.target import Claim, GeneratorModel, open_target
from sfumato.data.sources import open_source
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.networks import unet
from sfumato.diffusion.sampling import Sampler
from sfumato.errors import InputError

PRIVACY = {
    "format": "sfumato-privacy/1", "unit": "group", "relation": "add_or_remove_one", "public_size": None,
    "epsilon": 3.5, "delta": 1e-5, "reservations": [],
}  # fmt: skip


def write_images(folder, count=3, size=8):
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(np.full((size, size), 40 * number, np.uint8)).save(folder / f"{number}.png")
    return folder


def small_generator(labels=("a", "b"), **settings):
    torch.manual_seed(0)
    network = unet("tiny", size=(8, 8), channels=1, num_labels=len(labels))
    return Generator(network, labels, sampler=Sampler(steps=3), **settings)


@pytest.fixture
def run(tmp_path):
    """A finished run: config.yaml, internal/, release/ with images, model and privacy.json."""
    folder = tmp_path / "run"
    (folder / "internal").mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    write_images(folder / "release" / "images")
    (folder / "release" / "privacy.json").write_text(json.dumps(PRIVACY))
    small_generator().save_pretrained(folder / "release" / "model")
    return folder


@pytest.fixture
def pipeline(tmp_path):
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(4, 4),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, norm_num_groups=2,
        add_attention=False,
    )  # fmt: skip
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.parametrize("inside", ["", "release", "release/model"])
def test_a_run_a_release_and_its_model_are_one_target(run, inside):
    target = open_target(str(run / inside))
    assert target.kind == "sfumato" and target.claim == Claim(3.5, 1e-5, "group", "add_or_remove_one")
    assert target.description == "sfumato generator, 8 x 8 grey, 2 labels, heun sampler of 3 steps"
    assert len(open_source(target.images).records) == 3
    model = target.model
    assert (model.size, model.channels, model.num_labels, model.label_names) == ((8, 8), 1, 2, ("a", "b"))
    assert model.sigma_range == (0.002, 80.0) and model.device.type == "cpu"
    assert target.identity == open_target(str(run)).identity and len(target.identity) == 64


def test_a_releases_own_images_are_a_black_box_with_its_claim(run):
    target = open_target(str(run / "release" / "images"))
    assert target.kind == "images" and target.model is None and target.claim.epsilon == 3.5
    assert len(open_source(target.images).records) == 3


def test_a_release_without_a_model_is_a_black_box(run):
    shutil.rmtree(run / "release" / "model")
    target = open_target(str(run))
    assert target.kind == "images" and target.model is None and target.claim.epsilon == 3.5


def test_a_model_alone_claims_nothing_and_came_without_images(run, tmp_path):
    shutil.move(run / "release" / "model", tmp_path / "elsewhere")
    target = open_target(str(tmp_path / "elsewhere"))
    assert target.kind == "sfumato" and target.claim is None and target.images is None
    (tmp_path / "around").mkdir()
    shutil.move(tmp_path / "elsewhere", tmp_path / "around" / "model")
    assert open_target(str(tmp_path / "around")).identity == target.identity


def test_a_pipeline_folder_and_its_steps(pipeline):
    target = open_target(str(pipeline), steps=4)
    assert target.kind == "diffusers" and target.claim is None and target.images is None
    assert target.model.steps == 4 and "DDIMScheduler of 4 steps" in target.description
    assert target.model.sample(2)[0].shape == (2, 8, 8, 3)


def test_images_are_a_black_box(tmp_path):
    folder = write_images(tmp_path / "made")
    np.savez(tmp_path / "made.npz", images=np.zeros((2, 8, 8), np.uint8))
    for spec in (folder, tmp_path / "made.npz"):
        target = open_target(str(spec))
        assert target.kind == "images" and target.model is None and target.claim is None
        assert target.images == str(spec) and target.identity
    assert open_target("demo:digits").kind == "images"


def test_the_identity_is_that_of_settings_and_weights(run, pipeline):
    for folder, weights in ((run / "release" / "model", "."), (pipeline, "unet")):
        before = open_target(str(folder)).identity
        (folder / "README.md").write_text("words")
        assert open_target(str(folder)).identity == before
        file = folder / weights / "diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
        assert open_target(str(folder)).identity != before


@pytest.mark.parametrize("suffix", module.PICKLED)
def test_pickle_in_a_model_folder_is_refused_by_name(run, pipeline, suffix):
    for folder, spec in ((run / "release" / "model", run), (pipeline / "unet", pipeline)):
        stray = folder / f"stray{suffix.upper()}"
        stray.write_bytes(b"\x80\x04.")
        with pytest.raises(InputError, match=f"stray{suffix.upper()} may hold pickle.*nothing was audited"):
            open_target(str(spec))
        stray.unlink()


def test_pickle_is_refused_where_it_is_all_there_is(tmp_path, pipeline):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.ckpt").write_bytes(b"\x80\x04.")
    for spec in (folder, folder / "model.ckpt"):
        with pytest.raises(InputError, match=r"model\.ckpt may hold pickle"):
            open_target(str(spec))
    (pipeline / "model_index.json").unlink()
    (pipeline / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.bin may hold pickle"):
        open_target(str(pipeline))


def test_a_plain_image_folder_is_no_model_folder(tmp_path):
    folder = write_images(tmp_path / "made")
    (folder / "notes.pkl").write_bytes(b"\x80\x04.")
    assert open_target(str(folder)).kind == "images"


def test_parts_of_models_are_told_from_whole_ones(run, pipeline):
    for spec, says in (
        (pipeline / "unet", "a part of a model"),
        (pipeline / "unet" / "diffusion_pytorch_model.safetensors", "one file of weights"),
    ):
        with pytest.raises(InputError, match=f"{says}; nothing was audited"):
            open_target(str(spec))
    (pipeline / "model_index.json").unlink()
    with pytest.raises(InputError, match=r"model_index\.json is missing; nothing was audited"):
        open_target(str(pipeline))


@pytest.mark.parametrize(
    "damage",
    [
        lambda model: (model / "sfumato.json").write_text("{}"),
        lambda model: (model / "diffusion_pytorch_model.safetensors").unlink(),
        lambda model: (model / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing"),
        lambda model: (model / "config.json").write_text("{"),
    ],
)
def test_damaged_generators_are_refused_in_one_line(run, damage):
    damage(run / "release" / "model")
    with pytest.raises(InputError, match="nothing was audited") as refused:
        open_target(str(run))
    assert "\n" not in str(refused.value) and str(run / "release" / "model") in str(refused.value)


@pytest.mark.parametrize(
    "claim",
    ["{", "[]", {"epsilon": None}, {"epsilon": float("inf")}, {"epsilon": -1}, {"delta": 2}, {"unit": ...}],
)
def test_a_certificate_without_a_guarantee_is_refused(run, claim):
    path = run / "release" / "privacy.json"
    if isinstance(claim, dict):
        claim = json.dumps({name: value for name, value in (PRIVACY | claim).items() if value is not ...})
    path.write_text(claim)
    with pytest.raises(InputError, match=r"privacy\.json .*nothing was audited"):
        open_target(str(run))


def test_what_is_not_there_is_told_without_asking_a_hub(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("nobody named a hub model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for spec in ("runs/typo", "nothing", "./a/b", "a/b/c", "missing/images.npz", str(tmp_path / "x" / "y")):
        with pytest.raises(InputError, match="does not exist"):
            open_target(spec)


def test_a_hub_model_is_fetched_without_pickle(pipeline, monkeypatch, tmp_path):
    asked = []

    def fetch(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(pipeline)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert open_target("somebody/flowers-v1.5").kind == "diffusers"
    assert asked == [("somebody/flowers-v1.5", ["*.json", "*.safetensors"])]

    def unknown(*_, **__):
        raise OSError("no such model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unknown)
    with pytest.raises(InputError, match="hub model that can be fetched; nothing was audited"):
        open_target("somebody/flowers")


@pytest.mark.parametrize("kind", ["heun", "churn"])
@pytest.mark.parametrize("weight", [1.0, 1.7])
def test_our_images_are_those_of_generate_bit_for_bit(monkeypatch, kind, weight):
    monkeypatch.setattr("sfumato.diffusion.generator.BATCH", 2)
    generator = small_generator(guidance=weight)
    generator = generator.with_sampling(sampler=Sampler(kind=kind, steps=3))
    model, seen = GeneratorModel(generator), []
    for labels in (None, [1, 0, 1, 1, 0]):
        wanted = generator.generate(5, labels=labels, seed=3)
        found = model.sample(5, labels=labels, seed=3)
        assert np.array_equal(found[0], wanted[0]) and np.array_equal(found[1], wanted[1])

    def nothing(x, sigma, rows):
        seen.append(rows.tolist())
        return torch.zeros_like(x)

    pulled, _ = model.sample(5, labels=[1, 0, 1, 1, 0], seed=3, gradient=nothing, scale=2.0)
    assert np.array_equal(pulled, wanted[0])
    assert {tuple(rows) for rows in seen} == {(0, 1), (2, 3), (4,)}


def test_our_denoiser_is_edms():
    generator = small_generator(guidance=2.0)
    model, x = GeneratorModel(generator), torch.randn(3, 1, 8, 8)
    sigma, labels = torch.tensor([0.1, 1.0, 20.0]), torch.tensor([0, 1, 2])
    generator.network.eval()
    wanted = generator.edm.denoise(generator.network, x, sigma, labels)
    assert torch.equal(model.denoise(x, sigma, labels), wanted)
    none = generator.edm.denoise(generator.network, x, sigma, torch.full((3,), 2))
    assert torch.equal(model.denoise(x, sigma, None), none)
    only = GeneratorModel(small_generator(("all",)))
    only.network.eval()
    assert torch.equal(
        only.denoise(x, sigma, None), only.denoise(x, sigma, torch.zeros(3, dtype=torch.int64))
    )


def test_no_images_are_refused(run):
    with pytest.raises(InputError, match="at least one"):
        open_target(str(run)).model.sample(0)
