"""What this machine is, and which settings run fastest on it: measured once, remembered on disk.

Nothing here looks at data; timings are of random public inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("sfumato", "torch", "diffusers", "dp-accounting", "opendp", "cryptography", "SQLAlchemy", "numpy")
SECONDS_PER_SETTING = 0.5
WORTH_CHANGING = 0.9  # another setting must take at most this share of the default's time


@dataclass(frozen=True)
class Defaults:
    """Settings for this machine.

    threads: for torch. device: "cuda" or "cpu". public_dtype: of autocast in public training, "float32" or
    "bfloat16" (private training stays in float32: bfloat16 gradients do not agree to 1e-3 between engines).
    engine: of the clipped sum. measured_at: UTC time of the measurement.
    """

    threads: int
    device: str
    public_dtype: str
    engine: str
    measured_at: str


def best_defaults(cache_file: str | Path | None = None) -> Defaults:
    """The fastest settings found here; from `cache_file` if measured before on this machine and torch.

    The measurement takes about 5 seconds on an idle machine. On a busy one it is not remembered, because
    timings then say little. `cache_file` defaults to machine.json in the user's cache folder; a cache that
    cannot be read or written only means measuring again.
    """
    path = Path(cache_file) if cache_file is not None else _cache_file()
    key = _key()
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if known["key"] == key:
            return Defaults(**known["defaults"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    found = _measure()
    if _busy():
        return found
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump({"key": key, "defaults": asdict(found)}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        pass
    return found


def machine_report() -> dict[str, Any]:
    """Facts for bug reports: versions, processor, memory, allocator, device; no user names or paths."""
    import torch

    installed: dict[str, str] = {}
    for name in PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            installed[name] = "missing"
    flags = _cpu_facts().get("flags", "").split()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": installed,
        "processor": _cpu_facts().get("model name", platform.processor() or "unknown"),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16_instructions": [name for name in ("avx512_bf16", "amx_bf16") if name in flags],
        "mkl": torch.backends.mkl.is_available(),
        "onednn": torch.backends.mkldnn.is_available(),
        "memory_gb": _memory_gb(),
        "allocator": _allocator(),
        "accelerator": device,
    }


def _busy() -> bool:
    """Whether other processes want more than half of the cores; the average includes our own work."""
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > cores() / 2 + 1


def cores() -> int:
    """Processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _measure() -> Defaults:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads_before = torch.get_num_threads()
    candidates = sorted({cores(), max(1, cores() // 2)}, reverse=True)
    net, rows, loss = _example(device)

    def public_step(autocast: bool) -> None:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss(net, {name: tensor.flatten(0, 1) for name, tensor in rows.items()}).mean()
        value.backward()
        net.zero_grad(set_to_none=True)

    try:
        seconds: dict[int, float] = {}
        for threads in candidates if device == "cpu" else candidates[:1]:
            torch.set_num_threads(threads)
            seconds[threads] = _seconds(lambda: public_step(False))
        threads = _faster(seconds, candidates[0])
        torch.set_num_threads(threads)
        dtypes = {
            "float32": seconds[threads],
            "bfloat16": _seconds(lambda: public_step(True)),
        }
        engines = {
            engine: _seconds(lambda engine=engine: _private_step(net, rows, loss, engine))
            for engine in ("fast", "exact")
        }
    finally:
        torch.set_num_threads(threads_before)
    return Defaults(
        threads=threads,
        device=device,
        public_dtype=_faster(dtypes, "float32"),
        engine=_faster(engines, "fast"),
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _example(device: str) -> tuple[Any, dict[str, Any], Any]:
    """A small UNet, random rows [16 units, 4 rows, ...] and a loss."""
    import torch
    from diffusers.models.unets.unet_2d import UNet2DModel

    net = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8, add_attention=False,
    ).to(device)  # type: ignore  # fmt: skip
    rows = {"x": torch.randn(16, 4, 1, 16, 16, device=device), "t": torch.rand(16, 4, device=device)}

    def loss(call: Any, flat: dict[str, Any]) -> Any:
        return call(flat["x"], flat["t"]).sample.float().square().mean((1, 2, 3))

    return net, rows, loss


def _private_step(net: Any, rows: dict[str, Any], loss: Any, engine: Any) -> None:
    from sfumato.privacy.clipping import clipped_gradient_sum

    clipped_gradient_sum(net, loss, rows, clip_norm=1.0, engine=engine)


def _seconds(step: Any) -> float:
    """Best time of a step within SECONDS_PER_SETTING, after one step of warm-up."""
    import torch

    def once() -> float:
        start = time.perf_counter()
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    once()
    end, best = time.monotonic() + SECONDS_PER_SETTING, once()
    while time.monotonic() < end:
        best = min(best, once())
    return best


def _faster(seconds: dict[Any, float], default: Any) -> Any:
    """The quickest setting, or the default unless another is clearly quicker."""
    best = min(seconds, key=lambda setting: seconds[setting])
    return best if seconds[best] < WORTH_CHANGING * seconds[default] else default


def _key() -> str:
    import torch

    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    processor = [_cpu_facts().get(name, "") for name in ("model name", "flags")]
    facts = [platform.node(), platform.machine(), *processor, cores(), torch.__version__, accelerator]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _cache_file() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sfumato" / "machine.json"


def _cpu_facts() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _allocator() -> str:
    """The C library's allocator, or one loaded in its place."""
    try:
        loaded = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        loaded = ""
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if f"lib{name}" in loaded:
            return name
    return " ".join(platform.libc_ver()).strip() or "system"
