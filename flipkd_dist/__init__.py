"""Flipped knowledge distillation for text matching: a small encoder teaches a large decoder."""
