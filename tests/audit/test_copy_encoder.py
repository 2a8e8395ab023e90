"""The copy encoder finds changed copies, does not know training from held-out images, and is saved and found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import ks_2samp

from sfumato.audit.copy_encoder import CopyNetwork, contrastive_loss, train_copy_encoder, views
from sfumato.audit.matching import best_matches
from sfumato.audit.similarity import FLIPS, Extractor, Variant
from sfumato.data.digits import load_digits
from sfumato.data.images import OwnerArray
from sfumato.errors import InputError

STEPS = 120


def small(images: np.ndarray) -> np.ndarray:
    """Digits of 28 pixels to 14."""
    blocks = images.reshape(-1, 14, 2, 14, 2, 1).mean(axis=(2, 4))
    return blocks.astype(np.uint8)


DIGITS = np.random.default_rng(0).permutation(small(load_digits(holdout=False)[0]))  # they come sorted
TRAIN, HELD, FRESH = DIGITS[:1000], DIGITS[1000:1500], DIGITS[1500:3500]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("copy") / "work" / "copy.safetensors"


@pytest.fixture(scope="module")
def encoder(saved: Path) -> Extractor:
    return train_copy_encoder(TRAIN, HELD, steps=STEPS, seed=3, saved=saved)


def changed(kind: str, images: np.ndarray) -> np.ndarray:
    x = images.astype(float)
    if kind == "noise":
        x = x + np.random.default_rng(0).normal(0, 15, x.shape)
    elif kind == "shift":
        x = Variant(right=1)(x)
    elif kind == "blur":
        wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
        x = 0.5 * x + 0.5 * sum(wide[:, i : i + 14, j : j + 14] for i in range(3) for j in range(3)) / 9
    elif kind == "flip":
        x = x[:, :, ::-1]
    else:
        x = 0.8 * x + 30
    return np.clip(x, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "share"), [("noise", 0.7), ("shift", 0.35), ("blur", 0.5), ("flip", 0.99), ("brighter", 0.7)]
)
def test_changed_copies_are_found(encoder: Extractor, kind: str, share: float):
    """The very image out of 1,000, most of them of another digit; by chance 1 in 1,000."""
    found = best_matches(changed(kind, TRAIN[:200]), TRAIN, encoder)
    assert np.mean(found.index[:, 0] == np.arange(200)) >= share


def test_copies_are_closer_than_fresh_images(encoder: Extractor):
    copies = best_matches(changed("noise", TRAIN[:300]), TRAIN, encoder).similarity[:, 0]
    fresh = best_matches(FRESH[:300], TRAIN, encoder).similarity[:, 0]
    auc = np.mean(copies[:, None] > fresh) + np.mean(copies[:, None] == fresh) / 2
    assert auc > 0.85


def test_it_does_not_know_which_images_were_training_images(encoder: Extractor, saved: Path):
    """Swapped or shuffled sets give the very same encoder, so the matches are exchangeable by construction; and
    fresh images are as close to the one as to the other."""
    order = np.random.default_rng(0).permutation(1500)
    union = np.concatenate([TRAIN, HELD])
    for number, (one, other) in enumerate([(HELD, TRAIN), (union[order[:700]], union[order[700:]])]):
        again = train_copy_encoder(
            one, other, steps=4, seed=3, saved=saved.with_name(f"{number}.safetensors")
        )
        first = train_copy_encoder(TRAIN, HELD, steps=4, seed=3, saved=saved.with_name("first.safetensors"))
        assert again.identity == first.identity
    to_train = best_matches(FRESH, TRAIN[:500], encoder).similarity[:, 0]
    to_held = best_matches(FRESH[::-1], HELD, encoder).similarity[:, 0]
    assert ks_2samp(to_train[:1000], to_held[:1000]).pvalue > 1e-3
    closer = np.mean(to_train > to_held[::-1])
    assert abs(closer - 0.5) < 0.08


def test_equal_images_count_once(tmp_path: Path):
    many = np.concatenate([TRAIN[:50], TRAIN[:50], TRAIN[:30]])
    one = train_copy_encoder(TRAIN[:50], HELD[:50], steps=2, saved=tmp_path / "a")
    other = train_copy_encoder(many, HELD[:50], steps=2, saved=tmp_path / "b")
    assert one.identity == other.identity


def test_the_seed_decides(tmp_path: Path):
    torch.manual_seed(1)
    one = train_copy_encoder(TRAIN[:90], HELD[:90], steps=3, seed=0, saved=tmp_path / "a")
    torch.manual_seed(2)
    before = torch.random.get_rng_state()
    again = train_copy_encoder(TRAIN[:90], HELD[:90], steps=3, seed=0, saved=tmp_path / "b")
    assert torch.equal(before, torch.random.get_rng_state())
    other = train_copy_encoder(TRAIN[:90], HELD[:90], steps=3, seed=1, saved=tmp_path / "c")
    assert one.identity == again.identity != other.identity
    assert np.array_equal(one(FRESH[:5]), again(FRESH[:5]))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_it_is_saved_and_used_again(encoder: Extractor, saved: Path, capsys: pytest.CaptureFixture):
    again = train_copy_encoder(TRAIN, HELD, steps=STEPS, seed=3, saved=saved)
    assert "copy encoder" not in capsys.readouterr().err  # it was not trained once more
    assert again.identity == encoder.identity
    assert np.array_equal(again(FRESH[:7]), encoder(FRESH[:7]))
    assert saved.parent.stat().st_mode & 0o077 == 0


def test_what_it_says_of_itself(encoder: Extractor):
    assert (encoder.name, encoder.metric, encoder.variants) == ("copy", "cosine", FLIPS)
    assert len(bytes.fromhex(encoder.identity)) == 32 and "32 by 32" in encoder.preprocessing
    together = encoder(FRESH[:6].view(OwnerArray))
    assert isinstance(together, OwnerArray) and together.shape == (6, 128) and together.dtype == np.float32
    np.testing.assert_allclose(encoder(FRESH[2:3])[0], together[2], atol=1e-5)


@pytest.mark.parametrize("size", [8, 32, 33])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_any_size(tmp_path: Path, size: int, channels: int):
    images = np.random.default_rng(0).integers(0, 256, (6, size, size + 3, channels), dtype=np.uint8)
    assert train_copy_encoder(images[:3], images[3:], steps=1, saved=tmp_path / "a")(images).shape == (6, 128)


def test_the_loss_by_hand():
    """Two images of cosine 0.9: one logit 1 / t for the right view, two of 0.9 / t for the wrong ones."""
    first = torch.tensor([[1.0, 0.0], [0.9, 0.19**0.5]])
    expected = np.log(1 + 2 * np.exp(-0.1 / 0.07))
    assert contrastive_loss(first, first).item() == pytest.approx(expected, rel=1e-4)
    assert contrastive_loss(first, first.flip(0)).item() > 1.5


def test_views_differ_and_stay_near():
    x = torch.from_numpy(TRAIN[:64]).permute(0, 3, 1, 2).float() / 127.5 - 1
    one, other = (views(x, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert one.shape == x.shape and torch.isfinite(one).all()
    assert not torch.allclose(one, other)
    nearest = torch.cdist(one.flatten(1), torch.cat([x, x.flip(3)]).flatten(1)).argmin(1) % 64
    assert (nearest == torch.arange(64)).float().mean() > 0.4  # by chance 1 in 64


def test_bad_input_is_one_line(tmp_path: Path, encoder: Extractor, saved: Path):
    def refuses(match: str, *sets: np.ndarray, steps: int = 2, path: Path = tmp_path / "a") -> None:
        with pytest.raises(InputError, match=match) as caught:
            train_copy_encoder(*sets, steps=steps, saved=path)
        assert "nothing was audited" in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "a").exists()

    refuses("holdout: there are no images", TRAIN[:5], HELD[:0])
    refuses("different height, width or channels", TRAIN[:5], HELD[:5, 1:])
    refuses("all one picture", TRAIN[:1], TRAIN[:1])
    refuses("0 steps", TRAIN[:5], HELD[:5], steps=0)
    refuses("other images, or with other steps or seed", TRAIN[:5], HELD[:5], path=saved)
    (tmp_path / "text").write_text("no weights")
    refuses("cannot be read as a copy encoder", TRAIN[:5], HELD[:5], path=tmp_path / "text")
    save_file(CopyNetwork(1).state_dict(), tmp_path / "other.safetensors")
    refuses("is no copy encoder", TRAIN[:5], HELD[:5], path=tmp_path / "other.safetensors")
    (tmp_path / "file").write_text("")
    refuses("cannot be written", TRAIN[:5], HELD[:5], path=tmp_path / "file" / "copy.safetensors")
