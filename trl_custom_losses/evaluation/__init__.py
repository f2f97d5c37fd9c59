"""A base model against what was trained from it, on pairs and on prompts: what `scripts/evaluate.py` runs."""
