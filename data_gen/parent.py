"""A child process that ends when its parent is killed."""

import ctypes
import os
import signal
import sys

ASKED_FOR = "DATA_GEN_END_WITH_PARENT"  # its own pid, set by a program that runs data-gen


def end_with_parent(parent: int) -> None:
    """Ask Linux for SIGTERM when the parent ends, which a killed parent cannot send itself.

    `parent` is the pid that the parent has while it lives: Linux sends nothing for one that ended
    before it was asked, so a process that has another parent by then ends here.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)  # also between fork and exec, where an exception would be reported to nobody


def expected_parent() -> int | None:
    """The pid to end with, None where nobody asked for it."""
    value = os.environ.get(ASKED_FOR)
    if value is not None and not value.isdecimal():
        raise ValueError(f"{ASKED_FOR}={value!r}; it should be the pid of the parent process")
    return None if value is None else int(value)
