"""Dependencies point one way, and what must never be imported or called is not; read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfumato.cli.main import VERBS

PACKAGE = Path(__file__).parents[1] / "src" / "sfumato"

# Which rooms a room may import from; every room may also import the three modules of EVERYBODY.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "checkpoint": set(),
    "data": set(),
    "privacy": {"data"},
    "diffusion": {"data"},
    "encoders": {"data"},
    "evaluation": {"data", "diffusion", "encoders"},
    "report": {"data", "privacy"},
    "audit": {"data", "diffusion", "encoders", "evaluation", "privacy", "report"},
    "synthesis": {"audit", "data", "diffusion", "encoders", "evaluation", "machine", "privacy", "report"},
    "personalization": {"data", "encoders", "evaluation", "machine", "privacy", "report"},
    "retrieval": {"data", "diffusion", "encoders", "machine", "privacy", "report"},
    "machine": {"privacy", "data"},
    "cli": {
        "audit",
        "data",
        "diffusion",
        "evaluation",
        "machine",
        "personalization",
        "privacy",
        "report",
        "retrieval",
        "synthesis",
    },
}
EVERYBODY = {"checkpoint", "errors", "progress"}
FOREIGN = {"torchvision", "accelerate", "lightning", "pytorch_lightning", "hydra", "opacus", "torch_fidelity"}
LOADERS = {"import_module", "__import__"}
# The two loaders of other people's weights; TorchScript is a program, and the guide says so.
EXCUSED = {
    "encoders/efficientnet.py": {"torch.load(weights_only=True)"},
    "encoders/user.py": {"torch.jit.load"},
}
PICKLE = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


def imports(source: str) -> Iterator[str]:
    """Dotted names of all imports of a module, also inside functions and by import_module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in LOADERS:
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def wrong_direction(source: str, here: str) -> list[str]:
    """Imports of a module in room `here` that point the wrong way."""
    found = []
    for name in imports(source):
        parts = name.split(".")
        if parts[0] == "sfumato" and len(parts) > 1 and here in ALLOWED:
            allowed = ALLOWED[here] | EVERYBODY | {here}
            if parts[1] not in allowed and parts[1] != "__version__":
                found.append(name)
        elif parts == ["sfumato"] and here in ALLOWED:
            found.append(name)
    return found


def dangerous(source: str) -> list[str]:
    """Forbidden libraries, pickle in any form, and torch or numpy loading that could unpickle."""
    found = [name for name in imports(source) if name.split(".")[0] in FOREIGN | PICKLE]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in (
            "torch.load",
            "torch.save",
            "torch.jit.load",
            "pickle.loads",
            "pd.read_pickle",
            "eval",
            "exec",
        ):
            safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            found.append(name + "(weights_only=True)" * (name == "torch.load" and safe))
        if name in ("np.load", "numpy.load"):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if keywords.get("allow_pickle", "False") != "False":
                found.append(name)
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_one_way(path):
    assert wrong_direction(path.read_text(encoding="utf-8"), room(path)) == []


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_dangerous_or_foreign(path):
    excused = EXCUSED.get(path.relative_to(PACKAGE).as_posix(), set())
    assert set(dangerous(path.read_text(encoding="utf-8"))) - excused == set()


def test_every_room_has_its_rule():
    rooms = {room(path) for path in modules()} - {"__init__", "__main__"}
    assert rooms <= set(ALLOWED)


@pytest.mark.parametrize(
    ("here", "planted"),
    [
        ("privacy", "from sfumato.synthesis.run import synthesize"),
        ("privacy", "def f():\n    import sfumato.synthesis.privimage as method"),
        ("privacy", "from sfumato.diffusion import edm"),
        ("diffusion", "from sfumato.privacy.budget import Budget"),
        ("diffusion", "if TYPE_CHECKING:\n    import sfumato.privacy.ledger"),
        ("data", "from sfumato.privacy import ledger"),
        ("data", "from sfumato import Ledger"),
        ("evaluation", "import importlib\nimportlib.import_module('sfumato.privacy.ledger')"),
        ("synthesis", "from sfumato.cli.main import main"),
        ("report", "from sfumato.synthesis.options import SynthesizeOptions"),
    ],
)
def test_a_planted_wrong_direction_is_caught(here, planted):
    assert wrong_direction(planted, here)


@pytest.mark.parametrize(
    "planted",
    [
        "import torchvision",
        "from accelerate import Accelerator",
        "import lightning.pytorch as pl",
        "def f(path):\n    import pickle\n    return pickle.load(path)",
        "import torch\nstate = torch.load('x.pt', weights_only=True)",
        "import torch\ntorch.save({}, 'x.pt')",
        "import numpy as np\nnp.load('x.npy', allow_pickle=True)",
        "import joblib",
        "from opacus import PrivacyEngine",
    ],
)
def test_a_planted_danger_is_caught(planted):
    assert dangerous(planted)


def test_harmless_code_is_left_alone():
    harmless = "import torch\nnp.load('x.npz', allow_pickle=False)\nfrom safetensors.torch import load_file"
    assert dangerous(harmless) == []
    assert (
        wrong_direction("from sfumato.errors import InputError\nfrom sfumato.data import images", "privacy")
        == []
    )


HEAVY = (
    "torch",
    "dp_accounting",
    "diffusers",
    "scipy",
    "sklearn",
    "matplotlib",
    "numpy",
    "pyarrow",
    "sqlalchemy",
)


@pytest.mark.parametrize(
    "command",
    [
        "import sfumato; sfumato.__version__; dir(sfumato)",
        "from sfumato.cli.main import main; main(['--help'])",
        "from sfumato.cli.main import main; main(['--version'])",
        "from sfumato.cli.main import main; main(['synthesise'])",
        *(
            f"from sfumato.cli.main import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass"
            for verb in VERBS
        ),
    ],
)
def test_help_loads_nothing_heavy(command):
    probe = f"{command}\nimport sys\nprint('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("HEAVY []")
