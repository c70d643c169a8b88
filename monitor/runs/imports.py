"""Whether code runs within an import, where packages in C++ and Rust can take no exception."""

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
