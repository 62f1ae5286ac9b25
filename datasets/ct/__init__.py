"""Volumes as files: formats, geometry, the grid of a file."""
