"""Building of a model, its weights and its data from files; provenance of files."""
