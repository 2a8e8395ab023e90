"""Canaries: images whose membership was drawn by coins before training, so that an audit can bound epsilon.

Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1) Training Run" (arXiv 2305.08846): of m canaries each is
in the training set with probability 1/2, independently; whoever then sees the model and guesses who is in can be
right too often only if epsilon is large (epsilon_bound.py). The coins come from the secure stream, are sealed with
the images, and the seal is checked before they are used.

Guarantee: none. Canaries of kind "own" are private images, and who is in is for the owner only.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from sfumato.audit.canary_patterns import draw_patterns
from sfumato.audit.canary_scoring import SCORES, canary_scores
from sfumato.audit.epsilon_bound import canaries_needed, cap, looks_of
from sfumato.data.cache import sync_directory
from sfumato.data.files import write_whole
from sfumato.data.images import OwnerArray, OwnerImages
from sfumato.data.records import Source, fingerprint, printable
from sfumato.data.release import folder_names
from sfumato.data.sources import open_source
from sfumato.errors import InputError
from sfumato.evaluation.image_sets import common_shape, in_words, pixel_digests
from sfumato.privacy.randomness import SecureStream
from sfumato.progress import Progress

__all__ = ["Sealed", "canary_scores", "check_training", "open_sealed", "plant"]

FORMAT = "sfumato-canaries/1"
SEALED, PIXELS, TRAIN = "sealed.json", "sealed.npz", "train"
STATEMENT = (
    "Who is in the training set, for its owner only: whoever trains on train/ must not look at this file, and none "
    "of this folder is for release."
)
NOTHING = "nothing was planted"
CLAIMS = (1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Sealed:
    """m canaries and who of them is in.

    images: uint8 [m, H, W, C]. labels: int64 [m], index into label_names, -1 without labels (label_names None).
    included: bool [m]. kind: "own" (images of the private set, of which some were left out) or "pattern" (crafted,
    of which some were added). delta: of the claim. cap: the largest bound that m canaries can give, when every guess
    is right; audit_cap: the same for the `looks` ways of guessing that an audit tries. needed: claimed epsilon ->
    canaries without which such an audit cannot contradict it, None where no number can at this delta.
    identity: the seal, hexadecimal SHA-256. train_images: images in the training folder. expected_images: the
    mean of that number over the coins, which tells nothing about them. folder: where all of it lies.
    """

    images: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...] | None
    included: np.ndarray
    kind: str
    delta: float
    cap: float
    looks: int
    audit_cap: float
    needed: dict[str, int | None]
    identity: str
    train_images: int
    expected_images: int
    folder: Path

    for_owner_only = True

    def __len__(self) -> int:
        return len(self.images)


def plant(
    source: str | Path | Source,
    *,
    count: int,
    out: str | Path,
    kind: Literal["own", "pattern"] = "own",
    delta: float = 1e-5,
    size: int | None = None,
    channels: int | None = None,
    skip_unreadable: bool = False,
) -> Sealed:
    """Draw canaries, toss their coins, write the training folder and the seal; returns what was sealed.

    `out`/train/<label>/NNNNNN.png with metadata.jsonl (an image folder; flat where there are no labels), in random
    order, so that names and times tell nothing; `out`/sealed.npz and, last, `out`/sealed.json. Stopped earlier,
    it leaves nothing behind. Group and caption are not kept: every image is a unit of its own.

    kind "own": `count` images drawn at random are canaries, each of which stays with probability 1/2. Images that
    occur twice are none of them (a copy would tell nothing of its twin), and one image of each label always
    stays: the set of labels does not depend on the coins. "pattern": `count` crafted images with labels drawn
    uniformly, each added with probability 1/2.

    size, channels: side in pixels, and 1 or 3; by default what all images have. delta: for the cap.

    Raises:
        InputError: the source cannot be read or differs in size, has images without a label beside labelled
            ones, has too few images for `count`, or `out` is not an empty folder outside of it.
    """
    if count < 1:
        raise InputError(
            f"--count {count}: there is no canary to plant; {NOTHING}. Give 1 or more, better 1,000"
        )
    limits = _limits(count, delta)
    opened = source if isinstance(source, Source) else open_source(source)
    folder = _empty_folder(Path(out).expanduser(), opened)
    try:
        height, width, depth = common_shape(opened, printable(opened.spec), size=size, channels=channels)
    except InputError as error:
        said = str(error).partition("; nothing was measured")[0]
        raise InputError(
            f"{said}; {NOTHING}. Say with --size and --channels what all are brought to"
        ) from None
    existed = folder.exists()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        images = OwnerImages(
            opened,
            size=(height, width),
            channels=depth,
            cache_dir=folder / "reading",
            skip_unreadable=skip_unreadable,
        )
        return _planted(images, opened, count, kind, limits, folder)
    except BaseException as error:
        for name in (SEALED, PIXELS, PIXELS + ".partial", SEALED + ".partial"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / TRAIN, ignore_errors=True)
        if isinstance(error, OSError):
            raise InputError(
                f"'{folder}' cannot be written ({error.strerror or error}); {NOTHING}. Put it right and run it again"
            ) from None
        raise
    finally:
        shutil.rmtree(folder / "reading", ignore_errors=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # only where nothing was planted


def _planted(
    images: OwnerImages, source: Source, count: int, kind: str, limits: dict[str, Any], folder: Path
) -> Sealed:
    pixels, stream = np.asarray(images.images), SecureStream()
    names, labels = _used_labels(images, source)
    order = np.argsort(stream.uniform64(len(pixels)), kind="stable")
    included = stream.bernoulli(0.5, count)
    if kind == "own":
        drawn = _drawn(order, pixels, labels, count, source)
        canaries, of_canaries = pixels[drawn], labels[drawn]
        train = [(pixels, row) for row in np.setdiff1d(order, drawn[~included])]
        train_labels = [labels[row] for _, row in train]
        expected = len(pixels) - count // 2
    else:
        rng = np.random.default_rng(stream.seed())
        canaries = draw_patterns(count, pixels, rng)
        of_canaries = stream.integers(len(names), count) if names else np.full(count, -1)
        train = [(pixels, row) for row in order] + [(canaries, row) for row in np.flatnonzero(included)]
        train_labels = [*labels[order], *of_canaries[included]]
        expected = len(pixels) + count // 2
    shuffled = np.argsort(stream.uniform64(len(train)), kind="stable")
    _write_folder(
        folder / TRAIN, [train[i] for i in shuffled], [int(train_labels[i]) for i in shuffled], names
    )
    raw = io.BytesIO()
    np.savez_compressed(raw, images=canaries)
    write_whole(folder / PIXELS, raw.getvalue())
    digests = pixel_digests(canaries, "sealing")
    content = {
        "not_for_release": True, "format": FORMAT, "statement": STATEMENT, "kind": kind,
        "made_from": source.description, "size": list(pixels.shape[1:3]), "channels": pixels.shape[3],
        "label_names": names, "count": count, "included": int(included.sum()), "limits": limits,
        "train": {"images": len(train), "expected": expected},
        "pixels": {"file": PIXELS, "sha256": hashlib.sha256(raw.getvalue()).hexdigest()},
        "canaries": [
            {"digest": digest.tobytes().hex(), "label": names[label] if names else None, "included": bool(coin)}
            for digest, label, coin in zip(digests, of_canaries, included, strict=True)
        ],
    }  # fmt: skip
    sealed = json.dumps({**content, "seal": _seal(content)}, indent=1) + "\n"
    sync_directory(folder)
    write_whole(folder / SEALED, sealed.encode())
    for name in (PIXELS, SEALED):  # whoever trains may be let into the folder
        (folder / name).chmod(0o600)
    return open_sealed(folder / SEALED)


def _drawn(
    order: np.ndarray, pixels: np.ndarray, labels: np.ndarray, count: int, source: Source
) -> np.ndarray:
    """Rows of `count` images that may be canaries, the first in random order; int64."""
    digests = pixel_digests(pixels, "looking for copies")
    _, group, times = np.unique(digests, return_inverse=True, return_counts=True)
    copied = times[group] > 1
    ranked = order[np.argsort(copied[order], kind="stable")]  # so that how many may be canaries is no chance
    stays = ranked[np.unique(labels[ranked], return_index=True)[1]]
    eligible = order[~copied[order] & ~np.isin(order, stays)]
    if count > len(eligible):
        raise InputError(
            f"--count {count:,} is more than the {len(eligible):,} images of '{printable(source.spec)}' that can be "
            f"canaries (of {len(pixels):,}, without copies and without one of each label, which stays); {NOTHING}. "
            "Give a smaller --count, or --kind pattern"
        )
    return eligible[:count]


def _used_labels(images: OwnerImages, source: Source) -> tuple[list[str] | None, np.ndarray]:
    """The names of the labels that occur, sorted as a folder sorts them, and each image's number among them."""
    own = np.asarray(images.labels)
    if images.label_names is None or (own < 0).all():
        return None, np.full(len(own), -1)
    if (own < 0).any():
        raise InputError(
            f"'{printable(source.spec)}' has images without a label beside labelled ones; {NOTHING}. Label "
            "all of them, or none"
        )
    used = {images.label_names[label]: int(label) for label in np.unique(own)}
    names = sorted(used)
    number = np.zeros(len(images.label_names), np.int64)
    number[[used[name] for name in names]] = np.arange(len(names))
    return names, number[own]


def _write_folder(
    folder: Path, images: Sequence[tuple[np.ndarray, int]], labels: Sequence[int], names: list[str] | None
) -> None:
    """PNG files numbered in the given order; with labels in a folder for each, beside metadata.jsonl."""
    folders = folder_names(names) if names else []
    for inner in ("", *folders):
        (folder / inner).mkdir(exist_ok=True)
    rows = []
    with Progress("writing the training folder", total=len(images), unit="images") as progress:
        for number, ((array, row), label) in enumerate(zip(images, labels, strict=True), start=1):
            name = f"{number:06d}.png"
            if names:
                name = f"{folders[label]}/{name}"
                rows.append(json.dumps({"file_name": name, "label": names[label]}))
            pixels = array[row]
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(folder / name, "PNG")
            progress.advance()
    if names:
        write_whole(folder / "metadata.jsonl", ("\n".join(rows) + "\n").encode())


def _limits(count: int, delta: float) -> dict[str, Any]:
    """What so many canaries can show, and how many more claims need."""
    looks = SCORES * len(looks_of(count))
    needed: dict[str, int | None] = {}
    for claim in CLAIMS:
        try:
            needed[str(claim)] = canaries_needed(claim, delta, looks=looks)
        except InputError:
            needed[str(claim)] = None
    found = {"cap": cap(count, delta), "looks": looks, "audit_cap": cap(count, delta, looks=looks)}
    return {"delta": delta, **found, "needed": needed}


def _empty_folder(folder: Path, source: Source) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        unfinished = folder.is_dir() and not (folder / SEALED).exists() and (folder / TRAIN).exists()
        problem = "holds a planting that was never finished" if unfinished else "is not an empty folder"
        raise InputError(f"--out '{folder}' {problem}; {NOTHING}. Delete it, or give another --out")
    if source.location is not None and source.location in (folder.resolve(), *folder.resolve().parents):
        raise InputError(f"--out '{folder}' lies inside the images themselves; {NOTHING}. Give another --out")
    return folder


def _seal(content: dict[str, Any]) -> str:
    return fingerprint([json.dumps({k: v for k, v in content.items() if k != "seal"}, sort_keys=True)])


def open_sealed(path: str | Path) -> Sealed:
    """What `plant` sealed; path: its sealed.json, or the folder of it.

    The seal is a hash over all of sealed.json and, through it, sealed.npz: it shows damage and careless edits, not
    somebody who computes it anew (keep the seal that `plant` prints, if that matters).

    Raises:
        InputError: no such file, another format, or anything in it or in sealed.npz is not as it was sealed.
    """
    path = Path(path).expanduser()
    path = path / SEALED if path.is_dir() else path
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(
                f"--canaries '{path}' is no {SEALED} of `sfumato canaries plant`; nothing was audited"
            )
        if content.get("seal") != _seal(content):
            raise _broken(path, "was edited or is damaged: its hash does not match")
        raw = (path.parent / content["pixels"]["file"]).read_bytes()
        if hashlib.sha256(raw).hexdigest() != content["pixels"]["sha256"]:
            raise _broken(path.parent / PIXELS, "was edited or is damaged: its hash does not match")
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            images = file["images"]
        names, canaries = content["label_names"], content["canaries"]
        included = np.array([canary["included"] for canary in canaries], bool)
        number = {name: i for i, name in enumerate(names or ())}
        labels = np.array([number[each["label"]] if names else -1 for each in canaries], np.int64)
        digests = [digest.tobytes().hex() for digest in pixel_digests(images, "checking the seal")]
        agree = (
            images.shape == (content["count"], *content["size"], content["channels"])
            and len(canaries) == content["count"]
            and included.sum() == content["included"]
            and digests == [canary["digest"] for canary in canaries]
        )
        if not agree:
            raise _broken(path, "does not agree with itself about its canaries")
        return Sealed(
            images.view(OwnerArray), labels.view(OwnerArray), None if names is None else tuple(names),
            included.view(OwnerArray), content["kind"], **content["limits"], identity=content["seal"],
            train_images=int(content["train"]["images"]), expected_images=int(content["train"]["expected"]),
            folder=path.parent,
        )  # fmt: skip
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"--canaries '{error.filename or path}' cannot be read ({error.strerror or error}); nothing was audited. "
            f"Give DIR/{SEALED} as `sfumato canaries plant` wrote it"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, RecursionError) as error:
        raise _broken(path, f"is damaged ({type(error).__name__})") from None


def _broken(path: Path, problem: str) -> InputError:
    return InputError(
        f"--canaries '{path}' {problem}; nothing was audited: a bound on epsilon from it would be void. Take the "
        "file from a backup, or plant again and train again"
    )


def check_training(
    sealed: Sealed, train: str | Path | Source | np.ndarray, *, cache_dir: Path | None = None
) -> None:
    """Raise `InputError` unless the training images hold each canary that is in once, and none that is out.

    Compared pixel by pixel at the canaries' own size, whatever size the audit compares at. train: what --train
    names, or all its images, uint8 [N, H, W, C], at that size. What the target was in fact trained on nobody
    can check here: that it was this set is the word of whoever asks.
    """
    height, width, channels = shape = sealed.images.shape[1:]
    if isinstance(train, np.ndarray):
        if train.shape[1:] != shape:
            raise InputError(
                f"training images of {train.shape[1:]} cannot be compared with canaries of {in_words(shape)}; nothing "
                "was audited. Compare them at the canaries' own size"
            )
        images = train
    else:
        images = OwnerImages(train, size=(height, width), channels=channels, cache_dir=cache_dir).images
    found, times = np.unique(pixel_digests(np.asarray(images), "looking for canaries"), return_counts=True)
    place = dict(zip((digest.tobytes() for digest in found), times.tolist(), strict=True))
    present = np.array(
        [place.get(d.tobytes(), 0) for d in pixel_digests(np.asarray(sealed.images), "canaries")]
    )
    included = np.asarray(sealed.included)
    for wrong, says in (
        (included & (present == 0), "of the canaries that are in are not among them"),
        (~included & (present > 0), "canaries that were left out are among them"),
        (included & (present > 1), "canaries are among them more than once"),
    ):
        if wrong.any():
            raise InputError(
                f"--train is not the folder that the canaries were planted in: {int(wrong.sum()):,} {says}; nothing "
                f"was audited: a bound on epsilon would be void. Give --train '{sealed.folder / TRAIN}'"
            )
