"""Commands of `pyxlbert` that stand in files of their own: each adds its parser and runs it."""
