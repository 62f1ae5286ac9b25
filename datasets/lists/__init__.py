"""Data lists, label classes and splits."""
