"""Lets the manual show the section `Example:` of a docstring as code; griffe's own word for it is `Examples:`."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before a docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for each object that was read."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
