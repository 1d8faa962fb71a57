"""Memory between NumPy's operations.

Each result of NumPy's is new memory. What glibc's malloc gave back to the system meanwhile comes anew, page by page, at
some three microseconds each: for ten seconds of audio in SenseVoiceSmall's encoder up to 80 000 pages, a fifth of the
time, or none, as it happens to have set its thresholds.
"""

from __future__ import annotations

import numpy as np

_LARGEST = 31 << 20


def keep_freed_memory() -> None:
    """Have glibc keep up to 62 MiB of freed memory at hand, and blocks below 31 MiB on its heap; harmless elsewhere.

    It keeps twice as much as the largest block that it has seen given back, of up to 32 MiB: see `M_MMAP_THRESHOLD` in
    mallopt(3). One that no one has touched takes no memory.
    """
    np.empty(_LARGEST, np.uint8)
