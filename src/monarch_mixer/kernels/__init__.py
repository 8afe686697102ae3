"""Triton kernels of the layers. Each is reached through its op's one dispatch function and has its reference beside it.

Importing this package imports no Triton: a module with kernels is imported when its op first runs on a GPU.
"""

from monarch_mixer.kernels.support import kernels_enabled, use_kernels

__all__ = ["kernels_enabled", "use_kernels"]
