"""`sfumato render`: pictures with a released style token. Post-processing: free, however many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.image_folder import new_folder, write_images
from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError
from sfumato.personalization.options import RenderOptions


def run(arguments: Sequence[str]) -> int:
    """Parse, draw with stock diffusers, and write the pictures in one step."""
    arguments = ["--num-images" if argument == "-n" else argument for argument in arguments]
    options = parse(RenderOptions, "sfumato render", arguments)
    options.check()
    out = new_folder(options.out)
    token_file = Path(options.token_file)
    if token_file.is_dir():
        token_file = token_file / "learned_embeds.safetensors"
    if not token_file.exists():
        raise InputError(
            f"--token-file {token_file} does not exist. Give learned_embeds.safetensors of a release"
        )
    from sfumato.machine import best_defaults
    from sfumato.personalization.export import render

    pictures, named = render(
        options.model, token_file, options.prompt, options.num_images, seed=options.seed, steps=options.steps,
        guidance=options.guidance, negative_prompt=options.negative_prompt, device=best_defaults().device,
    )  # fmt: skip
    write_images(out, pictures, None, [])
    if not named:
        say("note: the prompt does not name the token, so the pictures are of the model alone")
    say(f"{len(pictures):,} pictures in {out}. Post-processing: no budget was spent.")
    return 0
