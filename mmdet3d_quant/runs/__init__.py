"""A model, its weights and its data, from files; and where files come from."""
