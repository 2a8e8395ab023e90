"""The command `sfumato`: finds the verb, runs it, and turns every failure into one line and an exit status.

Exit status: 0 done, 1 a check or a verification failed, 2 bad input or not enough budget, 3 an audit failed its
policy, 4 an audit could not decide, 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

from sfumato.errors import SfumatoError

VERBS = {
    "synthesize": "make a differentially private image set from sensitive images",
    "personalize": "learn one style token from private images",
    "render": "make pictures with a style token; costs no budget",
    "style-bank": "make a bank of public styles for a model, for less noise",
    "retrieve": "answer text prompts from a private image collection, on one budget",
    "generate": "make more images with a released model; costs no budget",
    "evaluate": "measure synthetic images against the real ones, for the owner's eyes",
    "audit": "find out what a generator memorised, for the owner's eyes",
    "canaries": "plant images in a training set that bound ε from below afterwards",
    "select": "let private images choose one of several releases; charged",
    "plan": "show what a privacy and a time budget buy; reads no private data",
    "ledger": "create, show, verify or close the privacy account of a set of images",
    "checks": "show versions and machine settings, and test the gradient engine here",
}

RESUMED = ("synthesize", "personalize", "evaluate", "audit", "select")

# What libraries that are not written in Python say of a full disk, in exceptions of their own.
FULL = ("No space left on device", "database or disk is full")

HELP = """usage: sfumato VERB [options]

Differentially private image generation on one persistent privacy ledger.

verbs:
{verbs}

options:
  -h, --help     show this help, or a verb's: sfumato VERB --help
  --version      print the version

first steps:
  sfumato synthesize demo:digits --public demo:glyphs --epsilon 8 --out runs/demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(verbs="\n".join(f"  {verb:<14} {does}" for verb, does in VERBS.items())), end="")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from importlib.metadata import version

        print(f"sfumato {version('sfumato')}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean `sfumato {near[0]}`?" if near else " See `sfumato --help`."
        return _error(f"unknown verb {verb!r}; it is one of {', '.join(VERBS)}.{hint}")
    try:
        return import_module(f"sfumato.cli.{verb.replace('-', '_')}").run(arguments[1:])
    except SfumatoError as error:
        return _error(str(error), error.exit_status)
    except KeyboardInterrupt:
        again = " Run the same command again to resume." if verb in RESUMED else ""
        print(f"\nsfumato: interrupted.{again}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _error(_operating_system(error))
    except MemoryError:
        return _error(
            "out of memory. Nothing written so far is lost and what was begun stays charged to the ledger; "
            "run the same command again on a machine with more memory, or with a smaller --size."
        )
    except Exception as error:
        if not any(words in str(error) for words in FULL):
            raise  # a defect: its traceback is what a bug report needs
        return _error(_operating_system(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))


def _operating_system(error: OSError) -> str:
    kept = "Nothing written so far is lost, and the ledger shows what was spent"
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or (error.errno is None and "requested and" in str(error)):
        return f"{where}the disk is full. {kept}; free some space and run the same command again."
    return f"{where}{error.strerror or error}. {kept}; put it right and run the same command again."


def _error(message: str, status: int = 2) -> int:
    print(f"sfumato: error: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
