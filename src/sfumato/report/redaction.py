"""An audit's result without the names of anything of the owner's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "[withheld]"
ENCODER = "an encoder of the owner's"
OWN_EXTRACTORS = ("pixels", "tiles", "phash", "efficientnet-lite0", "copy")
_SAID = {"target": "the generator", "train": "the training images", "holdout": "the held-out images"}
_LEFT_OUT = ("description",)
_AS_IT_IS = ("identity", "format")
# Quoted text with a slash or a file's ending in it (a path may hold blanks), then any word with a slash
# (fractions hide nothing) or an ending.
_QUOTED_PATH = re.compile(r"(?<!\w)(['\"`])(?:(?!\1).)*?(?:[/\\]|\.[A-Za-z]\w{1,10})(?:(?!\1).)*\1(?!\w)")
_PATH = re.compile(
    r"(?<!\S)(?!\(?\d+/\d+\b(?!/))(?:\S+[/\\]\S*|[/\\]\S+)|"
    r"\b[\w.-]+\.(?:zip|npz|parquet|gz|png|jpe?g|webp|tiff?|bmp|gif|pt|pth|onnx|json|ya?ml|safetensors|tar|h5|csv|idx)\b",
    re.I,
)


def redacted(result: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an audit's result for third parties.

    Descriptions of the target, the training and the held-out images are left out, and named by what they are
    where a sentence mentions them. Whatever looks like a path or a file name is withheld from every text, and
    so is the name of an encoder of the owner's. Figures and hashes stay.
    """
    names: list[tuple[str, str]] = []
    for part, said in _SAID.items():
        description = str((result.get(part) or {}).get("description") or "")
        last = re.split(r"[/\\]", description.rstrip("/\\"))[-1]
        names += [(name, said) for name in {description, last} if len(name) > 2]
    for part in ("extractor", "guidance_extractor"):
        name = str((result.get(part) or {}).get("name") or "")
        if name and name not in OWN_EXTRACTORS:
            names.append((name, ENCODER))
    names.sort(key=lambda pair: -len(pair[0]))
    clean = _scrubbed(dict(result), names)
    for part in ("extractor", "guidance_extractor"):
        if clean.get(part) and clean[part].get("name") not in (*OWN_EXTRACTORS, None):
            clean[part]["name"] = ENCODER
    return clean


def _scrubbed(value: Any, names: list[tuple[str, str]]) -> Any:
    if isinstance(value, str):
        if " " in value:  # a sentence; names of attacks and verdicts are words and stay
            for name, said in names:
                value = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", said, value)
        return _PATH.sub(HIDDEN, _QUOTED_PATH.sub(HIDDEN, value))
    if isinstance(value, Mapping):
        return {
            _scrubbed(key, names): inner if key in _AS_IT_IS else _scrubbed(inner, names)
            for key, inner in value.items()
            if key not in _LEFT_OUT
        }
    if isinstance(value, (list, tuple)):
        return [_scrubbed(inner, names) for inner in value]
    return value
