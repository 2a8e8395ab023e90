from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from sfumato.audit import guided_arms
from sfumato.audit.provenance import content_of
from sfumato.audit.side import SideSettings, classifier_conditioned, random_arm, side_attack
from sfumato.audit.surrogate import NoUsableSurrogate
from sfumato.audit.target import GeneratorModel
from sfumato.diffusion.edm import EDM
from sfumato.diffusion.generator import Generator
from sfumato.diffusion.sampling import Sampler
from sfumato.diffusion.training import TrainingPlan, train
from sfumato.encoders.pixels import Pixels
from sfumato.errors import InputError

SETTINGS = SideSettings(clusters=(2, 4), scales=(1.0, 4.0), pilot=4, steps=20, batch=16)


class Features(Pixels):
    """Pixels in [0, 1], so that a cosine tells dark from bright halves."""

    name = "halves"

    def __call__(self, images):
        return super().__call__(images) + 1


class Watched:
    """A model that counts what is drawn from it."""

    def __init__(self, inner):
        self.inner, self.calls = inner, []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __repr__(self):
        return repr(self.inner)

    def sample(self, num_images, **given):
        self.calls.append((num_images, given))
        return self.inner.sample(num_images, **given)


def halves(each, seed=0):
    """8x8 images whose bright half is the top, bottom, left or right one, of any brightness; which it is."""
    draw = np.random.default_rng(seed)
    kind = np.repeat(np.arange(4), each)
    images = np.zeros((4 * each, 8, 8, 1), np.uint8)
    for image, label in zip(images, kind, strict=True):
        image[[np.s_[:4, :], np.s_[4:, :], np.s_[:, :4], np.s_[:, 4:]][label]] = draw.integers(150, 255)
    return images, kind


def make_model(names, labels=None, steps=0):
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16, 32),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        norm_num_groups=8, num_class_embeds=len(names) + 1,
    )  # fmt: skip
    if steps:
        images, kind = halves(8)
        labels = np.zeros(len(kind), np.int64) if labels is None else labels
        train(
            net,
            images,
            labels,
            TrainingPlan(steps=steps, batch=32, lr=4e-3, ema_decay=0.9),
            edm=EDM(),
            no_label=len(names),
            seed=0,
        )
    net.requires_grad_(False)
    return GeneratorModel(Generator(net, names, sampler=Sampler(steps=4)))


def finely(model):
    """In steps that are small enough for guidance not to overshoot."""
    return GeneratorModel(model.generator.with_sampling(sampler=Sampler(steps=14)))


@pytest.fixture(scope="module")
def model():
    """Draws all four halves, none on demand."""
    return make_model(("all",), steps=90)


def attack(
    model, folder, *, num_images=12, score=lambda images: float(images.mean()), settings=SETTINGS, **given
):
    images, labels = halves(10, seed=5)
    labels = np.zeros(len(images), np.int64) if model.num_labels == 1 else labels
    given = {"seed": 3, **given}
    return side_attack(
        model, images, labels, Features(), num_images=num_images, score_pilot=score, settings=settings, folder=folder,
        **given,
    )  # fmt: skip


@pytest.fixture(scope="module")
def attacked(model, tmp_path_factory):
    watched, folder = Watched(model), tmp_path_factory.mktemp("side")
    return watched, folder, attack(watched, folder)


def test_three_arms_of_equal_size_and_different_noise(attacked):
    watched, _, result = attacked
    assert set(result.arms) == {"side", "side-shuffled", "random"}
    assert all(
        arm.images.shape == (12, 8, 8, 1) and arm.images.dtype == np.uint8 for arm in result.arms.values()
    )
    assert result.arms["random"].conditions is None
    pilot_seeds = {given["seed"] for n, given in watched.calls if n == SETTINGS.pilot}
    arm_seeds = [given["seed"] for n, given in watched.calls if n == 12]
    assert len(pilot_seeds) == 1 and len(set(arm_seeds)) == 3 and not pilot_seeds & set(arm_seeds)
    scales = [given.get("scale", 0.0) for n, given in watched.calls if n == 12]
    assert scales == [result.scale, result.scale, 0.0]


def test_the_pilot_decides(model, attacked, tmp_path):
    _, _, result = attacked
    assert [(p.clusters, p.scale) for p in result.pilot] == [(2, 1.0), (2, 4.0), (4, 1.0), (4, 4.0)]
    best = max(result.pilot, key=lambda point: point.score)
    assert (result.clusters, result.scale) == (best.clusters, best.scale) and len(
        result.surrogate
    ) == best.clusters
    for wanted in range(4):
        seen = []

        def score(images, seen=seen, wanted=wanted):
            seen.append(images)
            return 1.0 if len(seen) == wanted + 1 else 0.0

        chosen = attack(model, tmp_path, score=score, num_images=2)
        assert (chosen.clusters, chosen.scale) == [(2, 1.0), (2, 4.0), (4, 1.0), (4, 4.0)][wanted]
        assert [len(images) for images in seen] == [SETTINGS.pilot] * 4


def test_a_grid_of_one_point_needs_no_pilot(model, tmp_path):
    def never(images):
        raise AssertionError

    settings = replace(SETTINGS, clusters=(4,), scales=(2.0,), steps=2)
    result = attack(model, tmp_path, settings=settings, score=never, num_images=2)
    assert result.pilot == () and (result.clusters, result.scale) == (4, 2.0)


def test_the_surrogate_saw_the_generated_images_and_nothing_else(attacked, monkeypatch, model, tmp_path):
    result = attacked[2]
    assert result.provenance == content_of(halves(10, seed=5)[0], "test")
    learn = guided_arms.train_time_classifier

    def leaking(images, *given, **options):
        leaked = images.copy()
        leaked[0] = halves(8)[0][0]
        return learn(leaked, *given, **options)

    monkeypatch.setattr(guided_arms, "train_time_classifier", leaking)
    with pytest.raises(InputError, match="other images than the generated ones"):
        attack(model, tmp_path)


def same(one, other):
    return all(np.array_equal(one.arms[name].images, other.arms[name].images) for name in one.arms)


def test_the_same_call_resumes_and_another_does_not(attacked, model):
    watched, folder, result = attacked
    watched.calls.clear()
    assert same(attack(watched, folder), result) and watched.calls == []
    places = set(folder.rglob("*.npz"))
    assert len(places) == 4 + 3
    for removed in sorted(folder.rglob("side-shuffled-*.npz")):
        removed.write_bytes(removed.read_bytes()[:200])  # cut off while it was written, as by another program
    assert same(attack(watched, folder), result)
    assert [n for n, _ in watched.calls] == [12]
    watched.calls.clear()
    other = attack(watched, folder, seed=4)
    assert not any(np.array_equal(other.arms[name].images, result.arms[name].images) for name in other.arms)
    watched.calls.clear()
    attack(watched, folder, settings=replace(SETTINGS, steps=2))
    assert sum(n == 12 for n, _ in watched.calls) == 2  # unguided images are the same, whatever the settings
    watched.calls.clear()
    changed = GeneratorModel(model.generator.with_sampling(sampler=Sampler(steps=3)))
    attack(Watched(changed), folder, settings=replace(SETTINGS, steps=2))
    assert not same(attack(changed, folder, settings=replace(SETTINGS, steps=2)), result)


def test_random_arm_is_the_attack_s(attacked, model):
    _, folder, result = attacked
    assert np.array_equal(random_arm(model, 12, 3, folder).images, result.arms["random"].images)


def test_guided_images_are_of_their_cluster(model, tmp_path):
    """More often than with shuffled pseudo-labels, whose classifier knows nothing."""
    settings = replace(SETTINGS, clusters=(4,), scales=(1.5,), steps=80, batch=32)
    result = attack(finely(model), tmp_path, settings=settings, num_images=60)
    right = {}
    for name in ("side", "side-shuffled"):
        arm = result.arms[name]
        features = Features()(arm.images)
        cosine = (features / np.linalg.norm(features, axis=1, keepdims=True)) @ result.surrogate.centroids.T
        right[name] = (cosine.argmax(1) == arm.conditions).mean()
    assert right["side"] > 0.6 and right["side"] > right["side-shuffled"] + 0.2


def test_labels_of_a_class_conditional_model_follow_the_cluster(tmp_path):
    model = make_model(("a", "b", "c", "d"))
    settings = replace(SETTINGS, clusters=(4,), scales=(1.0,), steps=2)
    result = attack(model, tmp_path, settings=settings, num_images=40)
    kinds = halves(10, seed=5)[1]
    arm = result.arms["side"]
    cluster_to_kind = {c: set(kinds[result.surrogate.labels == c]) for c in range(4)}
    assert all(len(kind) == 1 for kind in cluster_to_kind.values())  # so that the label is known
    assert [{label} for label in arm.labels] == [cluster_to_kind[c] for c in arm.conditions]
    assert len(set(arm.conditions)) == 4
    assert np.bincount(result.arms["random"].labels).tolist() == [10] * 4
    with pytest.raises(InputError, match="are missing"):
        side_attack(
            model,
            halves(10)[0],
            None,
            Features(),
            num_images=2,
            score_pilot=np.mean,
            settings=settings,
            folder=tmp_path,
        )


def test_the_lora_branch(tmp_path):
    model = make_model(("a", "b", "c", "d"))
    settings = replace(
        SETTINGS, branch="lora", clusters=(4,), scales=(1.0, 2.0), steps=2, pilot=2, batch=4, rank=2
    )
    result = attack(model, tmp_path, settings=settings, num_images=4)
    assert len(result.pilot) == 2 and result.arms["side"].images.shape == (4, 8, 8, 1)
    again = attack(model, tmp_path, settings=settings, num_images=4)
    assert same(again, result)
    assert not np.array_equal(result.arms["side"].images, result.arms["random"].images)


def test_a_constant_generator_has_no_usable_surrogate(model, tmp_path):
    with pytest.raises(NoUsableSurrogate):
        side_attack(
            model, np.full((40, 8, 8, 1), 9, np.uint8), None, Features(), num_images=3, score_pilot=np.mean,
            settings=SETTINGS, folder=tmp_path,
        )  # fmt: skip


def test_unusable_numbers_of_clusters_are_left_out(model, tmp_path):
    images = np.tile(halves(1)[0][:2], (20, 1, 1, 1))  # two different images only
    result = side_attack(
        model, images, None, Features(), num_images=2, score_pilot=lambda i: 0.0,
        settings=replace(SETTINGS, clusters=(2, 30, 100), steps=2, pilot=2), folder=tmp_path,
    )  # fmt: skip
    assert {point.clusters for point in result.pilot} == {2}


def test_conditioned_on_real_labels(model, tmp_path):
    images, kind = halves(10)
    labels = np.where(kind == 3, -1, kind + 4)  # unlabelled ones are left out; numbers as they are
    result = classifier_conditioned(
        finely(model), images, labels, num_images=60, score_pilot=lambda images: float(images.std()),
        settings=replace(SETTINGS, scales=(1.0, 2.0), steps=60, batch=32), seed=1, folder=tmp_path,
    )  # fmt: skip
    assert set(result.arm.conditions) == {4, 5, 6} and result.scale in (1.0, 2.0) and len(result.pilot) == 2
    assert (result.arm.labels == 0).all()
    rows = result.arm.images.astype(float)
    top = rows[:, :4].mean((1, 2, 3)) - rows[:, 4:].mean((1, 2, 3))
    assert top[result.arm.conditions == 4].mean() > top[result.arm.conditions == 5].mean() + 30
    with pytest.raises(InputError, match="two labels or more"):
        classifier_conditioned(
            model, images, np.zeros(40), num_images=2, score_pilot=np.mean, folder=tmp_path
        )
    own = make_model(("a", "b"))
    with pytest.raises(InputError, match="label 6 and the model has 2"):
        classifier_conditioned(own, images, labels, num_images=2, score_pilot=np.mean, folder=tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"clusters": ()}, {"scales": (0.0,)}, {"scales": (np.nan,)}, {"pilot": 0}, {"lr": 0}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(InputError, match="nothing was audited"):
        SideSettings(**wrong)


def test_images_that_cannot_be_the_model_s_are_refused(model, tmp_path):
    for images, num_images in (
        (np.zeros((40, 9, 8, 1), np.uint8), 2),
        (np.zeros((40, 8, 8, 1)), 2),
        (halves(10)[0], 0),
    ):
        with pytest.raises(InputError, match="nothing was audited"):
            side_attack(
                model, images, None, Features(), num_images=num_images, score_pilot=np.mean, folder=tmp_path
            )
    with pytest.raises(ValueError, match="finite"):
        attack(model, tmp_path, score=lambda images: float("nan"))


@pytest.mark.slow
def test_of_an_overfitted_model_side_finds_at_least_what_random_sampling_finds(tmp_path):
    """64 digits at 8 pixels, 1,000 steps: copies are found, and guided images are closer to them than unguided ones."""
    from PIL import Image

    from sfumato.data.digits import load_digits

    def small(images):
        shrunk = [Image.fromarray(image[..., 0]).resize((8, 8), Image.Resampling.BOX) for image in images]
        return np.stack([np.asarray(image) for image in shrunk])[..., None]

    def distances(images, others):
        difference = images[:, None].astype(np.float32) - others[None].astype(np.float32)
        return np.sqrt(np.square(difference / 255).mean((2, 3, 4))).min(1)

    draw = np.random.default_rng(0)
    training = small(load_digits()[0][draw.permutation(4000)[:64]])
    held_out = small(load_digits(holdout=True)[0][draw.permutation(1000)[:960]])
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
        norm_num_groups=8, num_class_embeds=2,
    )  # fmt: skip
    plan = TrainingPlan(steps=1000, batch=64, lr=4e-3, label_dropout=0.0, ema_decay=0.98)
    train(net, training, np.zeros(64, np.int64), plan, edm=EDM(), no_label=1, seed=0)
    net.requires_grad_(False)
    overfitted = GeneratorModel(Generator(net, ("all",), sampler=Sampler(steps=12)))
    threshold = np.quantile(distances(held_out, training), 0.01)

    def excess(images):
        return float(
            np.mean([distances(images, block).mean() for block in np.split(held_out, 15)])
            - distances(images, training).mean()
        )

    own, labels = overfitted.sample(1000, seed=100)
    result = side_attack(
        overfitted, own, labels, Features(), num_images=300, score_pilot=excess,
        settings=SideSettings(clusters=(20, 60)), folder=tmp_path,
    )  # fmt: skip
    copies = {
        name: (distances(arm.images, training) <= threshold).mean() for name, arm in result.arms.items()
    }
    assert copies["random"] > 0.1 and copies["side"] > 0.1  # of held-out images it is 0.01
    assert excess(result.arms["side"].images) >= excess(result.arms["random"].images)
    assert excess(result.arms["random"].images) > 0.05
