"""Volumes as files: NIfTI, geometry, the grid of a file."""
