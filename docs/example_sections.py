"""For mkdocstrings: reads a docstring's section `Example:` as griffe reads `Examples:`, with its code as code."""

import re
from typing import Any

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before the docstring is parsed, and takes the Markdown out of types as transformers has them.

    griffe shows the type in `hidden_size (`int`, *optional*): …` as code, with its backticks and asterisks.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change one object's docstring."""
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r"(?m)^ *[\w, ]+ \(`.*?\):", lambda found: re.sub("[`*]", "", found[0]), text)
