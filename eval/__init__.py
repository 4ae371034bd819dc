"""Evaluation: needle retrieval by distance, and the table that compares ablation arms."""
