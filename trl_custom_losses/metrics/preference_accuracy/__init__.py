"""The metric `preference_accuracy`."""
