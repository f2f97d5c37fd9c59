"""The metric `diversity`."""
