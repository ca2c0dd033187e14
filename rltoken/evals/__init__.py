"""Evaluation: generate, grade, and metrics with intervals."""
