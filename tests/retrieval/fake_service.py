"""A collection and a generator that only pretend, for the service; as a program, the service on top of them.

    python fake_service.py FOLDER PORT WORKERS      the address goes to standard output

The collection's account is FOLDER/charges.txt, one prompt a line, under a lock that processes share; FOLDER/planned.txt
is how many prompts it may hold.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock

from sfumato.errors import BudgetError, InputError


@dataclass(frozen=True)
class Condition:
    vector: np.ndarray
    noise: float
    private: bool
    cached: bool


class FakeCollection:
    encoder = "an encoder"

    def __init__(self, folder: Path, planned: int | None = None) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        if planned is not None:
            (folder / "planned.txt").write_text(str(planned))

    @property
    def planned(self) -> int:
        return int((self.folder / "planned.txt").read_text())

    @property
    def charges(self) -> list[str]:
        file = self.folder / "charges.txt"
        return file.read_text(encoding="utf-8").splitlines() if file.exists() else []

    def condition(self, prompt: str, *, fallback: bool = False) -> Condition:
        if not prompt.strip() or not prompt.isprintable():
            raise InputError(
                "the prompt is empty or has control characters; no budget was spent. Use plain words"
            )
        vector = np.frombuffer(hashlib.sha256(prompt.encode()).digest(), np.uint8).astype(np.float32) / 255
        with FileLock(self.folder / "lock"):
            if prompt in self.charges:
                return Condition(vector, 0.1, True, True)
            if len(self.charges) >= self.planned:
                if fallback:
                    return Condition(vector, 0.0, False, False)
                raise BudgetError("all prompts of the budget are asked. Use a prompt asked before")
            with (self.folder / "charges.txt").open("a", encoding="utf-8") as file:
                file.write(f"{prompt}\n")
        return Condition(vector, 0.1, True, False)

    def status(self) -> dict:
        asked = len(self.charges)
        return {
            "mechanism": "ball", "epsilon": 1.0, "delta": 1e-5, "unit": "image", "queries_asked": asked,
            "queries_left": self.planned - asked, "queries_planned": self.planned,
            "statement": "(1, 1e-5)-differentially private for adding or removing one image, over all prompts.",
        }  # fmt: skip


class FakeGenerator:
    """Colour gradients of 32 × 32 pixels. `together` is how many were ever drawn at once."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.inside, self.together, self.calls = seconds, 0, 0, []
        self._lock = threading.Lock()

    def generate(self, vector: np.ndarray, noise: float, n: int, *, seed: int) -> np.ndarray:
        with self._lock:
            self.inside += 1
            self.together = max(self.together, self.inside)
            self.calls.append((noise, n, seed))
        time.sleep(self.seconds)
        with self._lock:
            self.inside -= 1
        y, x = np.mgrid[:32, :32] / 31
        shifts = np.random.default_rng(seed).random((n, 1, 1, 3))
        waves = np.stack([np.sin(6 * (x * vector[i] + y * vector[i + 3])) for i in range(3)], axis=-1)
        return np.uint8(127.5 * (1 + np.sin(waves + 6 * shifts)))


def stand_in() -> None:
    """Puts the pretenders where the service looks for the real ones."""
    collection, generator = types.ModuleType("collection"), types.ModuleType("generator")
    collection.open_source = lambda folder, encoder=None: FakeCollection(Path(folder))
    generator.open_generator = lambda spec, encoder: FakeGenerator(float(os.environ.get("FAKE_SECONDS", "0")))
    sys.modules["sfumato.retrieval.collection"] = collection
    sys.modules["sfumato.retrieval.generator"] = generator


if __name__ in ("__main__", "__mp_main__"):
    stand_in()

if __name__ == "__main__":
    from sfumato.retrieval.gate import read_token
    from sfumato.retrieval.serving import serve

    try:
        serve(
            sys.argv[1], port=int(sys.argv[2]), workers=int(sys.argv[3]), token=read_token(None),
            ready=lambda url: print(url, flush=True),
        )  # fmt: skip
        print("stopped", flush=True)
    except InputError as error:
        print(f"error: {error}", flush=True)
