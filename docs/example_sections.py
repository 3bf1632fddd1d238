"""For mkdocstrings: reads a docstring's section `Example:` as griffe reads `Examples:`, with its code as code."""

from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before the docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename it in one object's docstring."""
        if obj.docstring:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
