"""Products of groups of rows, each with its expert's weights: a plain reference and Triton kernels.

Room for `hopper.py` and `blackwell.py`, kernels of our own that use those GPUs' matrix units.
"""
