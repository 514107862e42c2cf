"""The checkpoint format, written and read. FORMAT.md says what is in the files."""
