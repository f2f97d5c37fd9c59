"""The metric `verifiable_accuracy`."""
