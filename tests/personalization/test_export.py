"""Token files, and `sfumato render` with stock diffusers."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sfumato.cli.main import main
from sfumato.errors import InputError
from sfumato.personalization.export import draw, load_token, read_token, write_token
from sfumato.personalization.text_to_image import open_pipeline


def rows_for(pipeline, vectors=1):
    rng = np.random.default_rng(0)
    encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
    return [
        rng.normal(size=(vectors, e.config.hidden_size)).astype(np.float32) for e in encoders if e is not None
    ]


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("vectors", [1, 2])
def test_what_is_written_is_read_and_loads(kind, vectors, folder_of, tmp_path):
    pipeline = open_pipeline(str(folder_of(kind)))
    rows = rows_for(pipeline, vectors)
    paths = write_token(tmp_path, "<s>", rows, {"statement": "x", "sfumato_privacy": {"epsilon": 1}})
    assert len(paths) == len(rows)
    token, found, header = read_token(paths[0])
    assert (
        token == "<s>"
        and np.array_equal(found, rows[0])
        and json.loads(header["sfumato_privacy"]) == {"epsilon": 1}
    )
    assert load_token(pipeline, paths[0]) == "<s>"
    ids = pipeline.tokenizer.convert_tokens_to_ids(["<s>", "<s>_1"][:vectors])
    assert np.allclose(pipeline.text_encoder.get_input_embeddings().weight[ids].detach().numpy(), rows[0])
    with pytest.raises(InputError, match="already in the model's vocabulary"):
        load_token(pipeline, paths[0])


def test_a_token_changes_the_picture_and_the_seed_fixes_it(folder_of, tmp_path):
    pipeline = open_pipeline(str(folder_of("sd1")))
    load_token(pipeline, write_token(tmp_path, "<s>", rows_for(pipeline), {})[0])
    with_token = draw(pipeline, ["a portrait of <s>"] * 3, steps=2, at_once=2)
    again = draw(pipeline, ["a portrait of <s>"] * 3, steps=2, at_once=2)
    without = draw(pipeline, ["a portrait"] * 3, steps=2, at_once=2)
    assert with_token.dtype == np.uint8 and len(with_token) == 3
    assert np.array_equal(with_token, again) and not np.array_equal(with_token, without)
    assert not np.array_equal(with_token[0], with_token[1])


def test_files_that_do_not_fit_are_refused(folder_of, tmp_path):
    small, large = open_pipeline(str(folder_of("sd1"))), open_pipeline(str(folder_of("sdxl")))
    path = write_token(tmp_path, "<s>", rows_for(large)[:1], {})[0]
    with pytest.raises(InputError, match=r"learned_embeds_2\.safetensors is missing"):
        load_token(large, path)
    save_file({"<s>": np.zeros((1, 7), np.float32)}, tmp_path / "seven.safetensors")
    with pytest.raises(InputError, match="rows of 7 numbers"):
        load_token(small, tmp_path / "seven.safetensors")
    save_file({"a": np.zeros(3), "b": np.zeros(3)}, tmp_path / "two.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("two.safetensors", "text.safetensors"):
        with pytest.raises(InputError, match="is no token file"):
            read_token(tmp_path / name)
    with pytest.raises(InputError, match="does not exist"):
        read_token(tmp_path / "nowhere.safetensors")


def test_render_writes_pictures_and_says_that_they_are_free(folder_of, tmp_path, capsys):
    folder = str(folder_of("sd1"))
    path = write_token(tmp_path, "<s>", rows_for(open_pipeline(folder)), {})[0]
    words = ["render", folder, "--token-file", str(path), "--steps", "2", "-n", "3", "--prompt"]
    assert main([*words, "a portrait of <s>", "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "3 pictures" in said and "no budget was spent" in said and "does not name" not in said
    pictures = sorted((tmp_path / "a").glob("*.png"))
    assert len(pictures) == 3 and Image.open(pictures[0]).mode == "RGB"
    assert main([*words, "a portrait", "--out", str(tmp_path / "b")]) == 0
    assert "does not name the token" in capsys.readouterr().out
    for wrong, expected in (
        (["--out", str(tmp_path / "a")], "already holds something"),
        (["--out", str(tmp_path / "c"), "--steps", "0"], "cannot be used"),
    ):
        assert main([*words, "a portrait of <s>", *wrong]) == 2
        assert expected in capsys.readouterr().err
    assert main(["render", folder, "--token-file", str(tmp_path / "no"), "--prompt", "x"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main([*words, " ", "--out", str(tmp_path / "d")]) == 2
    assert "is empty" in capsys.readouterr().err
