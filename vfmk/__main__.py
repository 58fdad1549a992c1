"""`python -m vfmk`, the command `vfmk`; for torchrun: `torchrun ... -m -- vfmk train ...`."""

from vfmk.cli import app

app()
