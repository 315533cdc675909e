"""Judges: of files (the linter), of engines (verify, the ladder), of whole detectors."""
