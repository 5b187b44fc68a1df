"""Tells numpy's BLAS to use one thread.

OpenBLAS's threads wait for each other by spinning. On cores that anything else uses too, a product that
takes 1.8 ms with one thread was measured to take 250 ms with two; and the second stage, the network and the
next process are always something else. The numpy engine spreads its work over threads that sleep
instead. Only OpenBLAS needs this, and numpy's wheels bring it everywhere but on macOS; another BLAS is
left as it is. The setting holds for the process, so it is made when a stage loads, not at import.
"""

from __future__ import annotations

import ctypes
from typing import Final

import numpy as np

# As numpy's wheels, scipy's builds and distributions name it; the last takes an int as the others do.
_SETTERS: Final = (
    "scipy_openblas_set_num_threads64_",
    "scipy_openblas_set_num_threads",
    "openblas_set_num_threads64_",
    "openblas_set_num_threads",
)


def limit_blas_to_one_thread() -> bool:
    """Whether there was an OpenBLAS to tell."""
    # A look-up in numpy's own extension searches the libraries that it is linked with.
    path = getattr(np._core._multiarray_umath, "__file__", None)  # type: ignore[attr-defined]
    if path is None:
        return False
    library = ctypes.CDLL(path)
    for name in _SETTERS:
        if hasattr(library, name):
            getattr(library, name)(ctypes.c_int(1))
            return True
    return False
