"""Scores, answers that are kept, and tables."""
