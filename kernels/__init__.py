"""Triton kernels, packaged as vfmk.kernels; importing this package imports no Triton."""
