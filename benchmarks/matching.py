"""How long the best matches of 10^4 generated among 6 * 10^4 training images take, in 512 numbers an image.

    python benchmarks/matching.py [--generated 10000] [--train 60000] [--dimension 512] [--threads 2] [--k 1]

Times `best_matches` as the audit calls it: images in, flips of the generated ones looked through, every pair compared.
The features are a random projection of 16-pixel grey images, so that what is timed is the matching and not a network;
a tenth of the generated images are copies, half of them flipped, and all of those have to be found. The goal is at
most 20 s on two threads and 2 GiB of resident memory, everything included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np
import torch

from sfumato.audit.matching import best_matches
from sfumato.audit.similarity import FLIPS, FeatureExtractor


def main() -> None:
    """Match, check and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, value in (
        ("generated", 10_000),
        ("train", 60_000),
        ("dimension", 512),
        ("threads", 2),
        ("k", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rng = np.random.default_rng(0)
    train, generated = (
        rng.integers(0, 256, (count, 16, 16, 1), dtype=np.uint8)
        for count in (options.train, options.generated)
    )
    copied = options.generated // 10
    generated[:copied] = train[:copied]
    generated[: copied // 2] = generated[: copied // 2, :, ::-1]
    weights = rng.normal(size=(256, options.dimension)).astype(np.float32)
    extractor = FeatureExtractor(
        "projection", "0" * 64, "a random projection", "cosine", FLIPS,
        lambda images: (images.reshape(len(images), -1).astype(np.float32) - 127.5) @ weights,
    )  # fmt: skip
    started, used = time.monotonic(), time.process_time()
    found = best_matches(generated, train, extractor, k=options.k)
    seconds, processor = time.monotonic() - started, time.process_time() - used
    if not np.array_equal(found.index[:copied, 0], np.arange(copied)):
        sys.exit("not all copies were found")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{options.generated} x {options.train} images, {options.dimension}-d, k = {options.k}, with flips, "
        f"{options.threads} threads: {seconds:.1f} s ({processor:.1f} s of processor time), peak {memory:.2f} GiB"
    )


if __name__ == "__main__":
    main()
