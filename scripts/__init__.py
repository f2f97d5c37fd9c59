"""Entry points, run from the repository root."""
