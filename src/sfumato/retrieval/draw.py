"""`sfumato retrieve ask` and `batch`: conditions, pictures, and the folder they are written to.

A folder of answers is safe to hand to anybody: pictures are drawn from released conditions alone, and its privacy.json
states what the whole index may cost.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfumato.data.files import write_whole
from sfumato.errors import BudgetError, InputError
from sfumato.progress import Progress
from sfumato.retrieval.codebook import Codebook
from sfumato.retrieval.collection import Collection, open_source
from sfumato.retrieval.conditions import Condition
from sfumato.retrieval.generator import open_generator
from sfumato.retrieval.options import AskOptions, BatchOptions
from sfumato.retrieval.prompts import checked_prompt


def ask(options: AskOptions) -> list[str]:
    """One prompt, n pictures in a new folder; returns what to say."""
    options.check()
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} already holds something; no budget was spent. Choose another folder")
    prompt = checked_prompt(options.prompt)
    source = open_source(options.index)
    generator = open_generator(options.generator, source.encoder)
    condition = source.condition(prompt, fallback=options.fallback)
    pictures = _drawn(generator, condition, options)
    _write(out, prompt, pictures)
    _certify(out, source)
    status = source.status()
    left = "" if status["queries_left"] is None else f" {status['queries_left']:,} questions left."
    return [f"{len(pictures)} pictures in {out}; {_how(condition)}.{left}", status["statement"]]


def batch(options: BatchOptions) -> list[str]:
    """Every line of a file; returns what to say. Stops, with what was drawn in place, when the budget is spent."""
    from sfumato.retrieval.build import read_prompts

    options.check()
    out = Path(options.out)
    prompts = read_prompts(Path(options.prompts), "PROMPTS")
    source = open_source(options.index)
    generator = open_generator(options.generator, source.encoder)
    _same_batch(out, options)
    done, refused = 0, None
    with Progress("prompts", total=len(prompts)) as progress:
        for prompt in prompts:
            if not _there(out, prompt, options.num_images):
                try:
                    condition = source.condition(prompt, fallback=options.fallback)
                except BudgetError as error:
                    refused = str(error)
                    break
                _write(out, prompt, _drawn(generator, condition, options))
            done += 1
            progress.advance()
    _certify(out, source)
    said = [f"{done:,} of {len(prompts):,} prompts in {out}.", source.status()["statement"]]
    return said if refused is None else [*said, f"stopped: {refused}"]


def _drawn(generator: Any, condition: Condition, options: AskOptions | BatchOptions) -> np.ndarray:
    return generator.generate(
        condition.vector, condition.noise, options.num_images, seed=options.seed, steps=options.steps,
        guidance=options.guidance,
    )  # fmt: skip


def _how(condition: Condition) -> str:
    if not condition.asked:
        return "the budget is spent: drawn without asking"
    charged = "free" if condition.cached else "charged once"
    if not condition.private:
        return f"{charged}; too little lies near to be told from noise"
    return charged


def _name(prompt: str) -> str:
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def _there(out: Path, prompt: str, count: int) -> bool:
    return all((out / _file(prompt, number)).is_file() for number in range(count))


def _file(prompt: str, number: int) -> str:
    return f"images/{_name(prompt)}-{number:04d}.png"


def _write(out: Path, prompt: str, pictures: np.ndarray) -> None:
    """The pictures, then a line of metadata for each: captions as `datasets` reads them."""
    (out / "images").mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        path = out / _file(prompt, number)
        Image.fromarray(picture).save(path.with_suffix(".partial"), format="PNG")
        os.replace(path.with_suffix(".partial"), path)
    rows = _rows(out)
    rows |= {Path(_file(prompt, n)).name: prompt for n in range(len(pictures))}
    lines = [
        json.dumps({"file_name": name, "text": text}, ensure_ascii=False)
        for name, text in sorted(rows.items())
    ]
    write_whole(out / "images" / "metadata.jsonl", ("\n".join(lines) + "\n").encode())


def _rows(out: Path) -> dict[str, str]:
    path = out / "images" / "metadata.jsonl"
    if not path.exists():
        return {}
    held = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["file_name"]: row["text"] for row in held}


def _certify(out: Path, source: Collection | Codebook) -> None:
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(source.certificate(), indent=2, ensure_ascii=False) + "\n"
    write_whole(out / "privacy.json", text.encode())


def _same_batch(out: Path, options: BatchOptions) -> None:
    """One folder, one way of drawing."""
    mine = {
        name: getattr(options, name)
        for name in ("index", "generator", "seed", "steps", "guidance", "num_images")
    }
    mine["index"] = str(Path(options.index).resolve())
    path = out / "batch.json"
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != mine:
            raise InputError(
                f"--out {out} was drawn with other options; no budget was spent. Give those, or another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise InputError(
            f"--out {out} already holds something else; no budget was spent. Choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(mine, indent=2) + "\n").encode())
