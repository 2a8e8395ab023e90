"""Who may reach what: read from the source code itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sfumato

SOURCE = Path(sfumato.__file__).parent
HANDLE = {"_images", "_labels", "_units"}
VECTORS = {"_segments", "_vectors", "_unit_of", "_alive", "_state", "_blocks"}
OF_THE_IMAGES_MODULE = {"_content", "_skipped", "_source"}
DATA_MAY_IMPORT = ("sfumato.errors", "sfumato.progress", "sfumato.data")


def reaches(code: str, names: set[str]) -> list[tuple[int, str]]:
    """(line, name) wherever code touches an attribute of these names, by a dot, as text, or by `__dict__`."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and node.attr in names:
            found.append((node.lineno, node.attr))
        elif isinstance(node, ast.Constant) and node.value in names:  # getattr, attrgetter, vars(x)[...]
            found.append((node.lineno, str(node.value)))
        elif isinstance(node, ast.MatchClass):
            found += [(node.lineno, name) for name in node.kwd_attrs if name in names]
    return found


def imports(code: str, package: str) -> list[tuple[int, str]]:
    """(line, module) of everything imported anywhere in the code; relative imports resolved."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            whole = base in ("sfumato", "")
            found += [(node.lineno, f"{base}.{alias.name}" if whole else base) for alias in node.names]
    return found


def modules() -> list[tuple[str, str]]:
    return [
        (path.relative_to(SOURCE).as_posix(), path.read_text("utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    ]


def allowed(module: str) -> bool:
    return module == "data/images.py" or module.startswith("privacy/")


@pytest.mark.parametrize(("module", "code"), modules(), ids=[name for name, _ in modules()])
def test_only_mechanisms_reach_protected_pixels(module: str, code: str) -> None:
    if not allowed(module):
        assert reaches(code, HANDLE) == []
    if module != "data/images.py":
        handled = [
            hit
            for hit in reaches(code, OF_THE_IMAGES_MODULE)
            if module.startswith(("data/", "synthesis/", "cli/"))
        ]
        assert handled == []


@pytest.mark.parametrize(("module", "code"), modules(), ids=[name for name, _ in modules()])
def test_only_mechanisms_reach_protected_vectors(module: str, code: str) -> None:
    if not module.startswith("privacy/"):
        another = {"_blocks"} if module == "encoders/efficientnet.py" else set()  # a network's own
        assert reaches(code, VECTORS - another) == []


def test_data_stands_on_nothing_else_of_the_package() -> None:
    for module, code in modules():
        if module.startswith("data/"):
            outside = [
                (line, name)
                for line, name in imports(code, "sfumato.data")
                if name.split(".")[0] == "sfumato" and not name.startswith(DATA_MAY_IMPORT)
            ]
            assert outside == [], module
            assert "torch" not in {name.split(".")[0] for _, name in imports(code, "sfumato.data")}, module


@pytest.mark.parametrize(
    "planted",
    [
        "private._images[0]",
        "x = self.private._labels",
        "len(p._units)",
        "getattr(p, '_images')",
        "vars(p)['_units']",
        "operator.attrgetter('_labels')(p)",
        "def f(p):\n    return [lambda: p._images]",
        "p._images = None",
        "del p._labels",
        "match p:\n    case X(_units=u): pass",
    ],
)
def test_a_planted_reach_is_caught(planted: str) -> None:
    assert reaches(planted, HANDLE)


@pytest.mark.parametrize(
    "planted",
    [
        "collection.private._vectors(rows)",
        "private._segments[0][1][3]",
        "getattr(private, '_unit_of')",
        "private._state.answer(key)",
        "vars(private)['_alive']",
        "for first, block in private._blocks(9): pass",
    ],
)
def test_a_planted_reach_for_vectors_is_caught(planted: str) -> None:
    assert reaches(planted, VECTORS)


def test_innocent_code_is_not_accused() -> None:
    assert reaches("public.images; labels = x.labels; _images = 3; 'the _images of'", HANDLE) == []


@pytest.mark.parametrize(
    "planted",
    [
        "import sfumato.privacy",
        "from sfumato import privacy",
        "from sfumato.privacy.ledger import Ledger",
        "def f():\n    from sfumato.synthesis import run",
        "from ..privacy import ledger",
        "from .. import privacy",
        "if True:\n    import sfumato.privacy.budget as b",
    ],
)
def test_a_planted_import_is_caught(planted: str) -> None:
    found = [name for _, name in imports(planted, "sfumato.data")]
    assert any(name.startswith("sfumato.") and not name.startswith(DATA_MAY_IMPORT) for name in found)


def test_an_import_within_the_room_is_fine() -> None:
    found = imports(
        "from . import cache\nfrom sfumato.errors import InputError\nimport numpy", "sfumato.data"
    )
    assert [name for _, name in found] == ["sfumato.data", "sfumato.errors", "numpy"]


def test_nothing_runs_or_unpickles_what_it_reads() -> None:
    forbidden = {"eval", "exec", "compile", "__import__"}
    for module, code in modules():
        if module.startswith("data/"):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                    assert node.func.id not in forbidden, module
                if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                    assert isinstance(node.value, ast.Constant), module
                    assert node.value.value is False, module
            assert not {"pickle", "marshal", "shelve", "subprocess", "joblib", "dill"} & {
                name.split(".")[0] for _, name in imports(code, "sfumato.data")
            }, module
