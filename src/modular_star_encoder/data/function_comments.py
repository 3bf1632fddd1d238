"""The comments that document a function: those that stand directly before it."""

import re
from bisect import bisect_right
from collections.abc import Iterator

from modular_star_encoder.data.documentation import comment_description
from modular_star_encoder.data.source_text import SourceText

# What may stand between a comment and the function that it documents.
_BLANK = re.compile(rb"\s*")
_GAPS = {
    "javascript": re.compile(rb"\s*(?:export\s+(?:default\s+)?)?(?:(?:var|let|const)\s+)?"),
    "ruby": re.compile(rb"\s*(?:[a-z]\w*[ \t(]+)?"),
    "c": re.compile(rb'\s*(?:extern\s+"C"\s*)?'),
    "cpp": re.compile(rb'\s*(?:extern\s+"C"\s*)?'),
}
_MAX_GAP_BYTES = 200
_DOCUMENTED_BY_BLOCKS_ONLY = {"java", "php", "javascript"}
_BLOCKS = ("/*", "=begin")
_AFTER_MEMBER = ("/**<", "/*!<", "///<", "//!<")


class Comments:
    """The comments of a text, in order; offsets are those of `SourceText.bytes`.

    No blank line may part a comment from its function. In Java, PHP and JavaScript only `/** */` documents, and other
    comments may follow it; in Go, Ruby, C and C++ it is the last block, or the run of lines that ends at the function.
    """

    def __init__(self, spans: list[tuple[int, int]], source: SourceText, language: str) -> None:
        self._spans = sorted(spans)
        self._source, self._language = source, language

    def description_before(self, start: int) -> str:
        """Return what the comments before the function at `start` describe, or ""."""
        blocks_only = self._language in _DOCUMENTED_BY_BLOCKS_ONLY
        run: list[str] = []
        for comment in self._before(start):
            if comment.startswith(_BLOCKS) and not blocks_only:
                run = run or [comment]
                break
            if comment.startswith("/**") and blocks_only:
                run = [comment]
                break
            if not blocks_only:
                run.insert(0, comment)
        return comment_description(run, self._language) if run else ""

    def _before(self, start: int) -> Iterator[str]:
        """Yield the comments that stand without a blank line before `start`, the last first."""
        text, source = self._source.bytes, self._source
        gap_rule = _GAPS.get(self._language, _BLANK)
        for index in range(bisect_right(self._spans, (start, start)) - 1, -1, -1):
            first, last = self._spans[index]
            gap = text[last:start]
            if len(gap) > _MAX_GAP_BYTES or gap.count(b"\n") > 1 or not gap_rule.fullmatch(gap):
                break
            comment = text[first:last].decode()
            follows_code = b"\n" in gap and text[source.line_start(first) : first].strip()
            if follows_code or comment.startswith(_AFTER_MEMBER):
                break
            yield comment
            start, gap_rule = first, _BLANK
