"""Predictions against measurements, by commands: ``python -m validation.published`` for published tables."""
