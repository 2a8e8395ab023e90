"""`sfumato generate`: more images from a released generator. Post-processing: free, however many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyro.conf import Positional

from sfumato.cli.image_folder import new_folder, write_images
from sfumato.cli.parsing import parse, say
from sfumato.errors import InputError


@dataclass(frozen=True)
class GenerateOptions:
    """Make more images with a released generator. Free: it costs no privacy budget, however many are made."""

    model: Positional[str]
    """The generator: a run's folder, its release/, its release/model, or a hub id such as OWNER/NAME."""

    out: str
    """Folder to write; one folder for each label, and metadata.jsonl. It must not hold anything yet."""

    num_images: int
    """How many images to make, a number above 0."""

    label: str | None = None
    """Make images of this label only, by name. Default: all labels in equal shares."""

    seed: int = 0
    """Seed of sampling, an integer. The same seed makes the same images."""

    guidance: float | None = None
    """Classifier-free guidance weight, a factor; 1 is none, larger makes labels clearer and images more
    alike. Default: the model's own."""


def run(arguments: Sequence[str]) -> int:
    """Parse, make the images, and write them in one step."""
    options = parse(GenerateOptions, "sfumato generate", arguments)
    if options.num_images < 1:
        raise InputError(f"--num-images {options.num_images} cannot be used: it has to be 1 or more.")
    if options.guidance is not None and options.guidance < 0:
        raise InputError(f"--guidance {options.guidance} cannot be used: it has to be 0 or more.")
    out = new_folder(options.out)

    from sfumato.diffusion.generator import Generator

    generator = Generator.from_pretrained(options.model)
    names = list(generator.label_names)
    labels = None
    if options.label is not None:
        if options.label not in names:
            raise InputError(f"--label {options.label!r}: the model knows {', '.join(names[:50])}.")
        labels = [names.index(options.label)] * options.num_images
    if options.guidance is not None:
        generator = generator.with_sampling(guidance=options.guidance)
    images, made = generator.generate(options.num_images, labels=labels, seed=options.seed)

    write_images(out, images, made if len(names) > 1 else None, names)
    say(f"{len(images):,} images in {out}. Post-processing: no budget was spent.")
    return 0
