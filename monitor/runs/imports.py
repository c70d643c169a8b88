"""Whether code runs within an import, where packages in C++ and Rust can take neither an exception nor the end."""

import sys
import threading
from types import FrameType


def imports(frame: FrameType | None) -> bool:
    """Whether a frame belongs to the import of a module.

    Args:
        frame: where a thread is; None where it isn't.

    Example:
        >>> import sys
        >>> imports(sys._getframe())
        False
    """
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def standing(thread: threading.Thread) -> tuple[int, int] | None:
    """Where a thread is, to be compared with where it is later; None while it imports, or when it has ended."""
    frame = sys._current_frames().get(thread.ident or 0)
    return None if frame is None or imports(frame) else (id(frame), frame.f_lasti)
