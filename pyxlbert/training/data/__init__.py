"""Readers of training data: every error names the file and the line."""
