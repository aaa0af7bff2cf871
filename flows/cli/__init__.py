"""Command line: parser, commands, and what they print."""
