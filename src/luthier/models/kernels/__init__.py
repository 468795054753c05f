"""Kernels of Luthier's own for bfloat16 on a CPU, in C, built where a compiler is: what PyTorch does in many passes, in one.

`library.py` builds and loads them, `calls.py` calls them on tensors, `fused.py` is attention through them. Whoever uses one has
another way where `kernels_for` gives none.
"""
