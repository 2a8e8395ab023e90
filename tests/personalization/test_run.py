"""`sfumato personalize` from its options to a release, on tiny stock pipelines; and every way to get it wrong."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open

from sfumato.cli.main import main
from sfumato.personalization import inversion
from sfumato.personalization.options import PersonalizeOptions
from sfumato.personalization.run import personalize
from sfumato.personalization.style_bank import StyleBank
from sfumato.personalization.text_to_image import TextToImage
from sfumato.privacy.ledger import Ledger
from sfumato.report.certificate import verify_certificate

UNITS = 12


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """Twelve private pictures."""
    folder, rng = tmp_path_factory.mktemp("drawings"), np.random.default_rng(0)
    for number in range(UNITS):
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def grouped(drawings, tmp_path_factory):
    """The same pictures by three artists, and by one."""

    def make(artists: int):
        folder = tmp_path_factory.mktemp("grouped") / "set"
        shutil.copytree(drawings, folder)
        rows = [{"file_name": f"{n:02d}.png", "group_id": f"artist {n % artists}"} for n in range(UNITS)]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    return make


@pytest.fixture(scope="module")
def bank_of(model_of, tmp_path_factory):
    """kind -> file of five random styles for that model; their residuals are long beside twelve images' noise."""
    folder = tmp_path_factory.mktemp("banks")

    def make(kind: str):
        path, model = folder / f"{kind}.safetensors", model_of(kind)
        if not path.exists():
            rng = np.random.default_rng(0)
            tokens = rng.normal(size=(5, model.dimension)).astype(np.float32)
            image_tokens = np.repeat(tokens, 3, axis=0) + 0.1 * rng.normal(size=(15, model.dimension))
            basis = np.linalg.qr((tokens - tokens.mean(0)).T)[0][:, :3]
            StyleBank(
                tuple("abcde"), tokens, image_tokens.astype(np.float32), np.repeat(np.arange(5), 3), tokens.mean(0),
                basis.astype(np.float32), model.fingerprint, 1,
            ).save(path)  # fmt: skip
        return path

    return make


@pytest.fixture
def options_of(drawings, folder_of, bank_of, tmp_path):
    """Options of a quick run; keywords replace."""

    def make(kind: str = "sd1", **given) -> PersonalizeOptions:
        usual = {
            "images": str(drawings), "epsilon": 20.0, "token": "<my-style>", "model": str(folder_of(kind)),
            "subspace": str(bank_of(kind)), "public_size": UNITS, "steps": 2, "batch_size": 4, "delta": 1e-5,
            "out": str(tmp_path / "run"),
        }  # fmt: skip
        return PersonalizeOptions(**{**usual, **given})

    return make


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_a_release_loads_in_stock_diffusers_and_draws(kind, options_of, folder_of):
    done = personalize(options_of(kind))
    release = done.release
    names = {path.name for path in release.iterdir()}
    files = {"learned_embeds.safetensors"} | ({"learned_embeds_2.safetensors"} if kind == "sdxl" else set())
    assert names == files | {"privacy.json", "README.md", "report.html"}
    pipeline = DiffusionPipeline.from_pretrained(str(folder_of(kind)))
    pairs = [("learned_embeds.safetensors", pipeline.text_encoder, pipeline.tokenizer)]
    if kind == "sdxl":
        pairs.append(("learned_embeds_2.safetensors", pipeline.text_encoder_2, pipeline.tokenizer_2))
    for name, encoder, tokenizer in pairs:
        with safe_open(release / name, framework="pt") as held:
            assert list(held.keys()) == ["<my-style>"]
            rows, header = held.get_tensor("<my-style>"), held.metadata()
        assert rows.dtype == torch.float32 and rows.shape == (1, encoder.config.hidden_size)
        assert json.loads(header["sfumato_privacy"]) == json.loads((release / "privacy.json").read_text())
        pipeline.load_textual_inversion(
            str(release), weight_name=name, text_encoder=encoder, tokenizer=tokenizer
        )
        found = encoder.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("<my-style>")]
        assert torch.equal(found.detach(), rows[0])
    picture = pipeline(
        "a portrait in the style of <my-style>", num_inference_steps=2, output_type="np"
    ).images[0]
    assert picture.shape[-1] == 3 and np.isfinite(picture).all()


def test_the_certificate_holds_and_the_ledger_has_it(options_of, tmp_path):
    done = personalize(options_of(ledger=str(_ledger(tmp_path, 25.0))))
    claim = json.loads((done.release / "privacy.json").read_text())
    assert (
        verify_certificate(claim).ok and claim["epsilon"] <= 20.0 and claim["relation"] == "add_or_remove_one"
    )
    assert [e["mechanism"] for r in claim["reservations"] for e in r["events"]] == ["vector_mean"]
    ledger = Ledger.open(tmp_path / "own.ledger.db")
    assert ledger.spent.epsilon == pytest.approx(claim["epsilon"]) and ledger.verify(claim["ledger"]["head"])
    assert all(reservation.status == "settled" for reservation in ledger.reservations())


@pytest.mark.parametrize(
    ("given", "mechanisms"),
    [
        ({"method": "mean"}, ["vector_mean"]),
        ({"method": "paper"}, ["vector_mean"]),
        ({"method": "selection", "epsilon": 2.0}, ["nearest_candidate"]),
        ({"method": "dp-sgd"}, ["dp_sgd"]),
        ({"anchor": "nearest"}, ["nearest_candidate", "vector_mean"]),
        ({"anchor": "art", "subspace": None, "epsilon": 4000.0}, ["vector_mean"]),
        ({"public_size": None, "epsilon": 60.0}, ["count", "vector_mean"]),
    ],
)
def test_every_method_is_charged_for_what_it_does(given, mechanisms, options_of, monkeypatch):
    from sfumato.personalization import dp_sgd_inversion

    quick = dp_sgd_inversion.DPSGDSettings(steps=3, expected_batch=4, draws=1)
    monkeypatch.setattr(dp_sgd_inversion, "DPSGDSettings", lambda: quick)
    done = personalize(options_of(**given))
    claim = json.loads((done.release / "privacy.json").read_text())
    assert [e["mechanism"] for r in claim["reservations"] for e in r["events"]] == mechanisms
    assert verify_certificate(claim).ok and claim["epsilon"] <= (given.get("epsilon") or 20.0) * (1 + 1e-9)


def test_nothing_private_is_in_the_release(options_of, drawings):
    done = personalize(options_of())
    said = (done.release / "report.html").read_text() + (done.release / "README.md").read_text()
    said += (done.release / "privacy.json").read_text()
    assert str(drawings) not in said and drawings.name not in said
    kept = list((done.release.parent / "internal" / "inversions").glob("*.f64"))
    raw = [np.frombuffer(path.read_bytes()) for path in kept]
    with safe_open(done.release / "learned_embeds.safetensors", framework="numpy") as held:
        token = held.get_tensor("<my-style>").ravel().astype(np.float64)
    assert raw and all(not np.allclose(token, one, atol=1e-3) for one in [*raw, np.mean(raw, axis=0)])


def test_the_same_command_again_does_nothing_and_costs_nothing(options_of, monkeypatch, capsys):
    first = personalize(options_of())
    before = (first.release / "learned_embeds.safetensors").read_bytes()
    monkeypatch.setattr(TextToImage, "losses", lambda *_: pytest.fail("the model was used"))
    assert personalize(options_of()) == first
    assert (first.release / "learned_embeds.safetensors").read_bytes() == before
    assert "this run is complete" in capsys.readouterr().err


def test_an_interrupted_inversion_goes_on_where_it_stopped(options_of, monkeypatch, tmp_path):
    real, calls = inversion.invert, []

    def stopping(*arguments, steps=None, **more):
        if steps == 2 and more.get("advance") is not None:  # not the self-test
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
        return real(*arguments, steps=steps, **more)

    monkeypatch.setattr(inversion, "invert", stopping)
    with pytest.raises(KeyboardInterrupt):
        personalize(options_of())
    assert (
        Ledger.open(tmp_path / "run" / "internal" / "ledger.db").reservations()[0].begun("vector_mean") == 0
    )
    assert not (tmp_path / "run" / "release").exists()
    personalize(options_of())
    assert len(calls) == 4  # three batches of four, the second of them twice


def test_an_answer_that_was_paid_for_is_not_asked_for_again(options_of, monkeypatch, tmp_path):
    from sfumato.personalization import run

    monkeypatch.setattr(run, "draw", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        personalize(options_of())
    noisy = np.load(tmp_path / "run" / "internal" / "checkpoints" / "vector_mean.npy")
    monkeypatch.undo()
    monkeypatch.setattr(run.vectors, "vector_mean", lambda *_: pytest.fail("asked twice"))
    done = personalize(options_of())
    assert Ledger.open(tmp_path / "run" / "internal" / "ledger.db").spent.epsilon <= 20
    with safe_open(done.release / "learned_embeds.safetensors", framework="numpy") as held:
        assert held.get_tensor("<my-style>").shape == (1, len(noisy))


@pytest.mark.parametrize("broken", [[3], list(range(UNITS))])
def test_nan_inversions_count_as_the_anchor_and_nobody_is_told(broken, options_of, monkeypatch, capfd):
    real = inversion.invert

    def failing(*arguments, steps=None, **more):
        found = real(*arguments, steps=steps, **more)
        if more.get("advance") is not None:
            found[[row for row in broken if row < len(found)]] = np.nan
        return found

    monkeypatch.setattr(inversion, "invert", failing)
    done = personalize(options_of(epsilon=4000.0))
    out, err = capfd.readouterr()
    assert "nan" not in (out + err).lower() and "fail" not in (out + err).lower()
    said = (done.release / "report.html").read_text()
    assert "NaN" not in said and "not finite" not in said
    with safe_open(done.release / "learned_embeds.safetensors", framework="numpy") as held:
        assert np.isfinite(held.get_tensor("<my-style>")).all()


def test_units_are_artists_where_that_is_asked(options_of, grouped):
    done = personalize(options_of(images=str(grouped(3)), unit="group", public_size=3, epsilon=100.0))
    claim = json.loads((done.release / "privacy.json").read_text())
    assert claim["unit"] == "group" and claim["public_size"] == 3


def refused(capsys, *arguments: str) -> str:
    """The one line that the command line answers with; exit status 2."""
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("sfumato: error: ") and "Traceback" not in said
    return said


@pytest.fixture
def command(options_of, capsys):
    """Runs the command line with some options replaced, and gives the refusal."""

    def run(**given) -> str:
        options = options_of(**given)
        words = ["personalize", options.images]
        for name in (
            "epsilon",
            "token",
            "model",
            "subspace",
            "public_size",
            "steps",
            "delta",
            "out",
            "unit",
            "anchor",
        ):
            value = getattr(options, name)
            if value is not None:
                words += ["--" + name.replace("_", "-"), str(value)]
        return refused(capsys, *words)

    return run


def test_bad_input_is_one_line_and_costs_nothing(command, options_of, folder_of, bank_of, grouped, tmp_path):
    assert "already in the model's vocabulary" in command(token="art")
    assert "is not one word" in command(token="my style")
    assert "cannot be used" in command(epsilon=0)
    assert "too large for 12 units" in command(delta=0.2)
    bare = tmp_path / "bare"
    shutil.copytree(folder_of("sd1"), bare)
    shutil.rmtree(bare / "text_encoder")
    assert "has no text_encoder" in command(model=bare)
    assert "does not exist" in command(model=tmp_path / "nowhere")
    assert "was made for another model" in command(subspace=bank_of("sdxl"))
    assert "is damaged or no style bank" in command(subspace=folder_of("sd1") / "unet" / "config.json")
    assert "one group" in command(images=str(grouped(1)), unit="group", public_size=1)
    assert "has capital letters" in command(token="<My-Style>")
    assert (
        not (tmp_path / "run" / "internal" / "ledger.db").exists()
        or not Ledger.open(tmp_path / "run" / "internal" / "ledger.db").reservations()
    )


def test_too_few_images_are_told_what_would_do(command, options_of, capsys):
    said = command(epsilon=0.05)
    assert "12 images are too few for ε 0.05" in said and "no budget was spent" in said
    units, epsilon = (said.split(part)[0].split()[-1] for part in (" images would do", " with these"))
    assert int(units) > UNITS and float(epsilon) > 0.05
    capsys.readouterr()
    assert (
        personalize(options_of(epsilon=float(epsilon), dry_run=True)) is None
    )  # the advice is not refused again
    assert "NOT ENOUGH" not in capsys.readouterr().out


def test_one_corrupt_image_is_named_and_can_be_left_out(options_of, drawings, tmp_path, capsys):
    folder = tmp_path / "with-a-bad-one"
    shutil.copytree(drawings, folder)
    (folder / "05.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(ValueError, match=r"05\.png.*no budget was spent"):
        personalize(options_of(images=str(folder)))
    done = personalize(options_of(images=str(folder), skip_unreadable=True))
    assert "05.png" not in (done.release / "report.html").read_text()


def test_another_run_is_not_mixed_into_the_folder(options_of):
    personalize(options_of())
    with pytest.raises(ValueError, match="holds a run with --epsilon"):
        personalize(options_of(epsilon=21.0))


def test_a_budget_that_is_spent_refuses_before_anything_is_learnt(options_of, tmp_path, monkeypatch):
    from sfumato.errors import BudgetError

    real = inversion.invert

    def only_the_test(*arguments, **more):
        assert more.get("advance") is None, "something was learnt"
        return real(*arguments, **more)

    monkeypatch.setattr(inversion, "invert", only_the_test)
    with pytest.raises(BudgetError, match="no budget was spent"):
        personalize(options_of(ledger=str(_ledger(tmp_path, 1.0))))


def test_a_dry_run_opens_nothing(options_of, tmp_path, capsys):
    assert personalize(options_of(images="/nowhere/at/all", dry_run=True)) is None
    assert "noise multiplier" in capsys.readouterr().out and not (tmp_path / "run").exists()


def _ledger(folder, epsilon):
    from sfumato.privacy.budget import Budget

    Ledger.open(folder / "own.ledger.db", total=Budget(epsilon, 1e-5))
    return folder / "own.ledger.db"


def test_tokens_of_other_arithmetic_are_not_taken_up(model_of, monkeypatch, tmp_path):
    """Which images would have them depends on who else is in the folder: one image could move another's token."""
    model, images = model_of("sd1"), np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    plan = inversion.InversionPlan(steps=1, batch_size=2)
    purposes = []
    for threads, autocast in ((1, False), (2, False), (1, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        monkeypatch.setattr(model, "autocast", autocast)
        embed = inversion.Inversion(model, model.token_of("art"), plan, kept=tmp_path)
        embed(images[:, : model.size, : model.size])
        purposes.append(embed._purpose)
    assert len(set(purposes)) == 3 and len(list(tmp_path.glob("*.f64"))) == 6


def test_the_owners_paths_stay_out_of_the_release(options_of, folder_of):
    done = personalize(options_of())
    said = (done.release / "report.html").read_text() + (done.release / "README.md").read_text()
    assert str(folder_of("sd1").parent) not in said and folder_of("sd1").name in said
    internal = done.release.parent / "internal"
    assert internal.stat().st_mode & 0o077 == 0
