"""The metric `completion_length`."""
