"""`python -m vfmk`, which torchrun can start: the command `vfmk`."""

from vfmk.cli import app

app()
