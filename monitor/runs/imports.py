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


def place(thread: threading.Thread) -> tuple[int, int] | None:
    """Where a thread is, to be compared with where it is later; None while it must not end.

    That is while it imports a module, or while pydantic, which W&B uses, calls it from code in Rust.
    """
    top = frame = sys._current_frames().get(thread.ident or 0)
    if top is None or imports(top):
        return None
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("pydantic."):
            return None
        frame = frame.f_back
    return id(top), top.f_lasti
