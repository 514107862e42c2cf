"""Triton kernels that the operations' ``triton.py`` and the GPU plans are made of."""
