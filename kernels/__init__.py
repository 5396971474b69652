"""Triton kernels, one module per op. Importing this package imports no triton."""
