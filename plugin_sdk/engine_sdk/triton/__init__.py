"""Portable Triton kernels, behind the contract's interfaces. Nothing here imports Triton before it is used."""
