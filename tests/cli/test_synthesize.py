"""`sfumato synthesize`: options, the YAML file, and refusals before anything heavy or costly happens."""

from __future__ import annotations

import sys
import types
from dataclasses import asdict

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sfumato.cli.main import main
from sfumato.cli.synthesize import resolve
from sfumato.errors import InputError
from sfumato.synthesis.options import SynthesizeOptions, read_config, seconds


def write(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_demo_command_line():
    options = resolve(["demo:digits", "--public", "demo:glyphs", "--epsilon", "8", "--out", "runs/demo"])
    assert options == SynthesizeOptions("demo:digits", 8.0, public="demo:glyphs", out="runs/demo")
    options.check()


def test_every_option_from_the_command_line():
    line = """x --epsilon 1 --public p --delta 1e-6 --method dpdm --preset demo --size 32 --channels 3
        --unit group --public-size 500 --num-images 9 --time-budget 2h --guidance 1.5 --warm-up 2 --robust 0.2 --ledger sqlite:///l.db
        --out o --holdout h --audit --audit-policy y --seed 3 --skip-unreadable --dry-run"""
    options = resolve(line.split())
    assert asdict(options) == {
        "private": "x", "epsilon": 1.0, "public": "p", "delta": 1e-6, "method": "dpdm", "preset": "demo",
        "size": 32, "channels": 3, "unit": "group", "public_size": 500, "num_images": 9, "time_budget": "2h",
        "guidance": 1.5, "warm_up": 2, "robust": 0.2, "ledger": "sqlite:///l.db", "out": "o", "holdout": "h", "seed": 3,
        "audit": True, "audit_policy": "y", "skip_unreadable": True, "dry_run": True, "config": None,
    }  # fmt: skip


def test_the_command_line_wins_over_the_file(tmp_path):
    path = write(tmp_path, "private: scans\nepsilon: 4\ndelta: 1e-7\nnum-images: 50\nskip_unreadable: true\n")
    options = resolve(["--config", path, "--epsilon", "2"])
    assert (options.private, options.epsilon, options.delta, options.num_images) == ("scans", 2.0, 1e-7, 50)
    assert options.skip_unreadable and options.config == path
    assert resolve([f"--config={path}", "others"]).private == "others"


def test_what_a_run_writes_down_can_be_read_back(tmp_path):
    options = SynthesizeOptions("scans", 4.0, delta=1e-6, public="p", channels=3, guidance=1.0)
    path = write(tmp_path, yaml.safe_dump(asdict(options)))
    read = read_config_without_config(path)
    assert SynthesizeOptions(**read) == options


def read_config_without_config(path):
    from pathlib import Path

    content = yaml.safe_load(Path(path).read_text())
    content.pop("config")
    Path(path).write_text(yaml.safe_dump(content))
    return read_config(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("epsilon: eight", "epsilon"),
        ("epsilon: true", "epsilon"),
        ("epsilonn: 8", "unknown option 'epsilonn'"),
        ("- 3\n- 4", "option: value"),
        ("a: [1", "not YAML"),
        ("method: magic", "method"),
        ("channels: 1.5", "channels"),
        ("dry_run: 'yes'", "dry_run"),
        ("private: null", "private"),
        ("!!python/object/apply:os.system ['true']", "not YAML"),
    ],
)
def test_a_bad_file_is_one_line_and_costs_nothing(tmp_path, text, says):
    with pytest.raises(InputError) as error:
        read_config(write(tmp_path, text))
    assert says in str(error.value) and "no budget was spent" in str(error.value)


def test_a_missing_file(capsys, tmp_path):
    assert main(["synthesize", "--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml: No such file" in capsys.readouterr().err
    assert main(["synthesize", "--config"]) == 2
    assert "--config needs the path" in capsys.readouterr().err


def test_an_empty_file_changes_nothing(tmp_path):
    assert read_config(write(tmp_path, "")) == {}


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ("--epsilon 0 --public p", "--epsilon 0"),
        ("--epsilon -1 --public p", "--epsilon -1"),
        ("--epsilon inf --public p", "--epsilon inf"),
        ("--epsilon nan --public p", "--epsilon nan"),
        ("--epsilon 1 --delta 1 --public p", "--delta 1"),
        ("--epsilon 1 --delta 0 --public p", "--delta 0"),
        ("--epsilon 1 --public p --size 4", "--size 4"),
        ("--epsilon 1 --public p --public-size 0", "--public-size 0"),
        ("--epsilon 1 --public p --num-images -5", "--num-images -5"),
        ("--epsilon 1 --public p --guidance -1", "--guidance -1"),
        ("--epsilon 1 --public p --time-budget soon", "--time-budget"),
        ("--epsilon 1", "--public"),
        ("--epsilon 1 --method public-only", "--public"),
    ],
)
def test_values_that_can_never_work(capsys, monkeypatch, arguments, names):
    planted = types.ModuleType("sfumato.synthesis.run")
    planted.synthesize = lambda options: pytest.fail("the work was begun")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sfumato.synthesis.run", planted)
    assert main(["synthesize", "x", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert names in error and "no budget was spent" in error and error.count("\n") == 1


def test_the_work_gets_the_options(monkeypatch):
    got = []
    planted = types.ModuleType("sfumato.synthesis.run")
    planted.synthesize = got.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sfumato.synthesis.run", planted)
    assert main(["synthesize", "x", "--epsilon", "2", "--method", "dpdm"]) == 0
    assert got == [SynthesizeOptions("x", 2.0, method="dpdm")]


@pytest.mark.parametrize(
    ("private", "epsilon", "folder"),
    [
        ("demo:digits", 8.0, "runs/demo-digits-eps8"),
        ("/data/My Scans.zip", 0.5, "runs/my-scans-eps0.5"),
        ("scans/", 2.0, "runs/scans-eps2"),
        ("..", 2.0, "runs/images-eps2"),
    ],
)
def test_where_a_run_goes(private, epsilon, folder):
    options = SynthesizeOptions(private, epsilon)
    assert str(options.run_folder) == folder
    assert options.ledger_url == f"{folder}/internal/ledger.db"
    named = SynthesizeOptions(private, epsilon, out="here", ledger="sqlite:///a.db")
    assert (str(named.run_folder), named.ledger_url) == ("here", "sqlite:///a.db")


@pytest.mark.parametrize(
    ("text", "value"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400), ("1.5 h", 5400), ("10M", 600)],
)
def test_durations(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "10", "m", "0s", "-5m", "10m later", "5d", "1:30"])
def test_not_durations(text):
    with pytest.raises(InputError, match="--time-budget"):
        seconds(text)


@given(st.integers(1, 10**6))
def test_seconds_are_seconds(number):
    assert seconds(f"{number}s") == number
