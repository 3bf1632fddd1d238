import codecs

import pytest

from modular_star_encoder.data.sources.decoding import decode_source

TEXT = "# Jürgen ist größer\nx = 1\n"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (TEXT.encode(), (TEXT, "utf-8")),
        (codecs.BOM_UTF8 + TEXT.encode(), (TEXT, "utf-8")),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), (TEXT, "utf-16-le")),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), (TEXT, "utf-16-be")),
        (codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"), (TEXT, "utf-32-le")),
        (codecs.BOM_UTF16_LE + b"a\0b", ("a�", "utf-16-le")),
        (TEXT.encode("latin-1"), (TEXT, None)),
        (b"", ("", "utf-8")),
    ],
)
def test_a_mark_decides_then_utf_8_and_latin_1_reads_the_rest(content, expected):
    assert decode_source(content) == expected


@pytest.mark.parametrize(
    "line",
    [
        "# -*- coding: {} -*-",
        "#!/usr/bin/python\n# vim: set fileencoding={} :",
        "/* -*- coding: {} -*- */",
        "\f\t # coding={}",
        "#!/bin/sh\r# coding: {}",
    ],
)
def test_a_coding_line_among_the_first_two_decides(line):
    text = line.format("koi8-r") + "\nname = 'Юрий'\n"
    assert decode_source(text.encode("koi8-r")) == (text, "koi8-r")


MISFITS = [*(f"# coding: {name}" for name in ("ascii", "nobody", "zlib", "idna")), "x = 'coding: koi8-r'"]


@pytest.mark.parametrize("line", [*MISFITS, "\n\n#coding: koi8-r"])
def test_a_coding_line_that_does_not_fit_is_ignored(line):
    text = f"{line}\nx = 'é'\n"
    assert decode_source(text.encode()) == (text, "utf-8")
    assert decode_source(text.encode("latin-1")) == (text, None)
    for text in ("# coding: punycode\nabc-" + "b" * 40, "# coding: idna\na = 1\n"):  # of domain names; they would fit
        assert decode_source(text.encode()) == (text, "utf-8")
