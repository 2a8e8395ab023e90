"""Captioned portraits in many drawn styles, from DiceBear's packages: what the embedded text-to-image model learns.

    python benchmarks/data/portraits.py lorelei micah --count 2500 --size 32
    python benchmarks/data/portraits.py public              # every style the embedded model may see
    python benchmarks/data/portraits.py held-out            # the styles that experiments keep private

Writes portraits-STYLE-SIZE.npz for each style (`images` uint8 [N, size, size, 3] on white, `attributes`: one JSON
object of words per image) and a .json with package, version, licence and creator. Needs npm and node, and
`pip install resvg-py`; what is there already is not drawn again.

Attributes come from the drawing code itself, so they are true by construction. Rare ones (glasses, beards,
earrings, hats) are drawn more often than the packages would, as a model learns little from one in twenty.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from fetch import CACHE, DICEBEAR, FetchError, drawn_by_dicebear, is_there, keep, on_white

PUBLIC = (
    "adventurer", "adventurer-neutral", "big-ears", "big-ears-neutral", "big-smile", "dylan", "fun-emoji",
    "lorelei", "lorelei-neutral", "micah", "miniavs", "open-peeps", "personas", "pixel-art", "pixel-art-neutral",
    "thumbs", "toon-head",
)  # fmt: skip
"""Styles under CC0 1.0 or CC BY 4.0 that the embedded model may see."""

HELD_OUT = ("notionists", "croodles")
"""Styles that experiments protect; they and their neutral variants stay out of all public training."""

COLOURS = {
    "black": "101010", "brown": "6b4226", "blonde": "e5c98a", "red": "c8401e", "grey": "b0b0b0", "white": "f4f4f4",
    "blue": "3a6fe0", "green": "2fa866", "pink": "ee88b0", "purple": "6a3d9a", "yellow": "fde725", "orange": "f08c30",
}  # fmt: skip
HAIR = {
    "bald": "bald|balndess|nohair|shavedhead|shaved[0-9]|mrclean|dougfunny",
    "mohawk": "mohawk|mrt$",
    "curly": "curl|afro|twist|bantu|frobun",
    "bun": "bun",
    "long": "long|pony|straight|pigtail|braid|dread|cornrow|medium|bob|wavy|bangs",
    "short": "short|buzz|fade|classic|elvis|stylish|pomp|flat|pixie|fonze|danny|full|undercut|spiky|sidecomed|bowl"
    "|plain|shaggy|fluffy|parting|sideshave|slaughter|halfshaved",
}
HATS = "hat|beanie|cap$|turban|hijab"
HAPPY = "happy|smile|laugh|lol|cheery|grin|kawaii|cute|hopeful|twinkle"
SAD = "sad|frown|angry|rage|concern|serious|unimpressed|pissed|cry"


def described(extra: dict[str, Any]) -> dict[str, str]:
    """Words for what a drawing shows, from the names its code gives the parts: hair, colour, glasses, ..."""
    parts = {key: str(value).lower() for key, value in extra.items() if value}
    said: dict[str, str] = {}
    worn = " ".join(parts.get(key, "") for key in ("glasses", "accessories", "eyes"))
    if "glasses" in parts or re.search("glasses|shades", worn):
        said["glasses"] = "sunglasses" if re.search("sunglasses|shades", worn) else "glasses"
    face = " ".join(
        parts.get(key, "") for key in ("beard", "facialHair", "mustache", "features", "accessories")
    )
    if "mustache" in parts or re.search("m(o)?ustache|walrus", face):
        said["beard"] = "a moustache"
    elif "beard" in parts or "facialHair" in parts:
        said["beard"] = "a beard"
    if "earrings" in parts:
        said["earrings"] = "earrings"
    top = " ".join(parts.get(key, "") for key in ("hair", "rearHair", "head", "top"))
    if "hat" in parts or re.search(HATS, top):
        said["hat"] = "a hat"
    else:
        cut = next((word for word, names in HAIR.items() if re.search(names, top)), "")
        colour = parts.get("hairColor", parts.get("topColor", parts.get("headContrastColor", "")))
        named = nearest_colour(colour) if "hair" in parts or "head" in parts or "top" in parts else ""
        if cut == "bald":
            said["hair"] = "no hair"
        elif cut or named:
            said["hair"] = " ".join(word for word in (cut, named, "hair") if word)
    mood = " ".join(parts.get(key, "") for key in ("mouth", "face", "mood"))
    if re.search(HAPPY, mood):
        said["mood"] = "smiling"
    elif re.search(SAD, mood):
        said["mood"] = "sad"
    if (skin := parts.get("skinColor", parts.get("baseColor", ""))) and skin.strip("#") not in (
        "ffffff",
        "000000",
    ):
        red, green, blue = (int(skin.strip("#")[i : i + 2], 16) for i in (0, 2, 4))
        said["skin"] = "dark skin" if 0.3 * red + 0.59 * green + 0.11 * blue < 150 else "light skin"
    return said


def nearest_colour(code: str) -> str:
    """The name of the colour nearest to "#rrggbb"; "" without one."""
    if not re.fullmatch("#?[0-9a-f]{6}", code):
        return ""
    wanted = np.array([int(code.strip("#")[i : i + 2], 16) for i in (0, 2, 4)])
    distance = {
        name: np.square(wanted - [int(value[i : i + 2], 16) for i in (0, 2, 4)]).sum()
        for name, value in COLOURS.items()
    }
    return min(distance, key=distance.__getitem__)


def portraits(style: str, out: Path, *, count: int, size: int, seed: int = 0) -> Path:
    """portraits-STYLE-SIZE.npz in `out`, drawn if it is not there yet. Raises FetchError, OSError."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"portraits-{style}-{size}.npz"
    wanted = {"style": style, "count": count, "size": size, "seed": seed, "recipe": 1}
    if is_there(path, wanted):
        return path
    packages: dict[str, Any] = {}
    images, attributes, known = [], [], set()
    drawn: Iterator[Any] = drawn_by_dicebear(
        out / "packages", packages, style, seed, 4 * size, count=2 * count, often=35
    )
    for face in drawn:
        image = on_white(face["svg"], size)
        if image.tobytes() not in known:
            known.add(image.tobytes())
            images.append(image)
            attributes.append(json.dumps(described(face["has"])))
        if len(images) == count:
            break
    arrays = {"images": np.stack(images), "attributes": np.array(attributes)}
    keep(path, arrays, {**wanted, "images": len(images), "packages": packages})
    return path


def main() -> None:
    """Draw what is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("styles", nargs="+", help="styles by name, `public` or `held-out`")
    parser.add_argument("--out", type=Path, default=CACHE, help=f"folder to write to (default {CACHE})")
    parser.add_argument("--size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--count", type=int, default=2500, help="portraits of each style")
    options = parser.parse_args()
    names = [
        name
        for given in options.styles
        for name in {"public": PUBLIC, "held-out": HELD_OUT}.get(given, (given,))
    ]
    try:
        for name in names:
            print(portraits(name, options.out, count=options.count, size=options.size), flush=True)
    except (FetchError, OSError) as error:
        sys.exit(f"error: {error} (@dicebear {DICEBEAR})")


if __name__ == "__main__":
    main()
