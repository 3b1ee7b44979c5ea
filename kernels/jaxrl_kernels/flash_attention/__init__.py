"""Flash attention: a plain reference and the Triton kernels.

Room for `hopper.py` and `blackwell.py`, kernels of our own that use those GPUs' matrix units.
"""
