"""Silence for a moment: transformers and diffusers remark on stock parts and draw bars for a second of loading."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without those bars and remarks; everything is as before afterwards."""
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    levels = logging.get_verbosity(), of_transformers.get_verbosity()
    bars = of_transformers.is_progress_bar_enabled()
    logging.set_verbosity_error()
    of_transformers.set_verbosity_error()
    logging.disable_progress_bar()
    of_transformers.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")  # its successor is new
            yield
    finally:
        logging.set_verbosity(levels[0])
        of_transformers.set_verbosity(levels[1])
        logging.enable_progress_bar()
        if bars:
            of_transformers.enable_progress_bar()
