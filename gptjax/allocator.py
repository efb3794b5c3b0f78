"""Sets up the C library's malloc for a door, which on Linux means starting it once more.

XLA's CPU backend asks malloc for the temporaries of each step, hundreds of megabytes, and glibc gives them back to the
system each time: page faults then take a fifth of a step or more. glibc reads its settings from the environment when a
process starts and at no other time, so the door replaces itself, under the same process id. What surprises readers:
XLA often asks on a thread of its own, for which glibc keeps no block above 64 MB; there only the larger pages help.
"""

from __future__ import annotations

import os
import sys

_TUNABLES = {
    "glibc.malloc.hugetlb": 1,  # pages of 2 MB where the system has them: few faults, few TLB misses
    "glibc.malloc.mmap_threshold": 2**31 - 1,  # large blocks come from the heap where it can hold them,
    "glibc.malloc.trim_threshold": 2**31 - 1,  # and the heap keeps what is freed
    "glibc.malloc.top_pad": 256 << 20,
}
_VARIABLE = "GLIBC_TUNABLES"


def restart_with_large_pages() -> None:
    """Does not return where the C library is glibc and the environment says nothing of malloc yet.

    Must come before anything that a restart would repeat; the interpreter gets the same arguments again.
    """
    present = os.environ.get(_VARIABLE, "")
    if "glibc.malloc." in present or not _is_glibc() or not sys.executable:
        return
    settings = [f"{name}={value}" for name, value in _TUNABLES.items()]
    os.environ[_VARIABLE] = ":".join([present, *settings] if present else settings)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_glibc() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False
