"""What writes the generated pages of ``docs/`` from code and data, and frames the site."""
