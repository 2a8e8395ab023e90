"""`python -m sfumato`, which torchrun needs, is the same as `sfumato`."""

from sfumato.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
