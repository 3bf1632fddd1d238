"""Readers of source code: one protocol (`source_files.SourceReader`), and a module for each kind of source."""
