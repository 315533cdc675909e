"""Whole jobs from files to files: what a tool does, to be called from Python."""
