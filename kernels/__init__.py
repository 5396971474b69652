"""Triton kernels: one module per stem, each with its kernels, their launchers and, beside these, the torch ops
`twinflow::triton_*` that the launchers become. Needs torch and triton; importing this package alone imports neither."""
