"""Keep freed memory for the next training step on a CPU."""

from __future__ import annotations

import ctypes
import os

#: glibc's numbers for the options, and their values; sizes are int32.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_OWN_MAPPING, _NEVER = (1 << 28, 1 << 25), 2**31 - 1  # before glibc 2.35 only the second is allowed
_ENVIRONMENT = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Make the C library's allocator keep freed memory, for the life of the process.

    A step frees its activations and gradients, and glibc returns much of that to the operating system, which clears each page
    again at its first touch in the next step. Blocks above 256 MB (32 MB before glibc 2.35) are still returned.

    Returns:
        Whether it was done: not if an environment variable already configures glibc, nor with another C library.

    Example:
        >>> kept = keep_freed_memory()
    """
    if any(name in os.environ for name in _ENVIRONMENT):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no such function; no such library
        return False
    return any(mallopt(_MMAP_THRESHOLD, size) for size in _OWN_MAPPING) and bool(mallopt(_TRIM_THRESHOLD, _NEVER))
