"""The service under 32 clients on loopback: throughput, p99, and whether anything is overspent.

    python benchmarks/retrieval_service.py [--workers 1] [--json FILE]      # a few minutes

An index of 2,000 random portraits-like images (noise) with 50 planned questions is served with the embedded encoder
and generator. 32 clients ask 80 different prompts, each twice, one picture of 25 steps each time, as fast as they are
answered; when the budget is spent they get 429. Afterwards the ledger must hold exactly 50 questions, and exactly 50
prompts must have been answered. A second round asks one known prompt only: what drawing and HTTP alone take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np

from sfumato.retrieval.build import build_index
from sfumato.retrieval.collection import Collection
from sfumato.retrieval.options import IndexOptions

CLIENTS, PLANNED, PROMPTS, KNOWN, RECORDS, PORT = 32, 50, 80, 160, 2_000, 8765


def load(client: httpx.Client, prompts: list[str]) -> tuple[list[float], list[tuple[str, int, bool]], float]:
    """(seconds of each request, (prompt, status, cached) of each, wall-clock seconds) with 32 at once."""

    def ask(prompt: str) -> tuple[float, tuple[str, int, bool]]:
        while True:
            started = time.monotonic()
            answer = client.post("/v1/generate", json={"prompt": prompt, "n": 1, "seed": 0})
            if answer.status_code != 503:  # busy: try again, as told
                break
            time.sleep(0.2)
        cached = answer.status_code == 200 and answer.json()["cached"]
        return time.monotonic() - started, (prompt, answer.status_code, cached)

    began = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, prompts))
    return [each[0] for each in found], [each[1] for each in found], time.monotonic() - began


def main() -> None:
    """Serve, ask, count."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        private, index = Path(temporary) / "private.npz", Path(temporary) / "index"
        np.savez(
            private, images=np.random.default_rng(0).integers(0, 256, (RECORDS, 32, 32, 3), dtype=np.uint8)
        )
        build_index(IndexOptions(str(private), 10.0, str(index), queries=PLANNED, public_size=RECORDS))
        command = [sys.executable, "-m", "sfumato", "retrieve", "serve", str(index), "--port", str(PORT)]
        server = subprocess.Popen([*command, "--workers", str(options.workers)])
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=600, limits=httpx.Limits(
                max_connections=CLIENTS
            )) as client:  # fmt: skip
                for _ in range(600):
                    try:
                        if client.get("/healthz").status_code == 200:
                            break
                    except httpx.TransportError:
                        time.sleep(0.2)
                order = np.random.default_rng(1).permutation(
                    [f"portrait number {i}" for i in range(PROMPTS)] * 2
                )
                seconds, answers, wall = load(client, order.tolist())
                known = next(prompt for prompt, status, _ in answers if status == 200)
                again, _, wall_again = load(client, [known] * KNOWN)
        finally:
            server.terminate()
            server.wait()
        charged = Collection.open(index).status()["queries_asked"]
        answered = {prompt for prompt, status, _ in answers if status == 200}
        row = {
            "workers": options.workers, "requests": len(seconds), "per_second": len(seconds) / wall,
            "median_s": float(np.median(seconds)), "p99_s": float(np.quantile(seconds, 0.99)),
            "known_per_second": len(again) / wall_again, "known_median_s": float(np.median(again)),
            "known_p99_s": float(np.quantile(again, 0.99)), "charged": charged, "planned": PLANNED,
            "answered": len(answered), "status": dict(Counter(str(status) for _, status, _ in answers)),
        }  # fmt: skip
        print(json.dumps(row, indent=1))
        if charged != PLANNED or len(answered) != PLANNED:
            sys.exit("the ledger and the answers do not agree")
        if options.json is not None:
            options.json.write_text(json.dumps(row, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
