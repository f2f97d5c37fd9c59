"""Balancing of several objectives: by their losses or by their gradients."""
