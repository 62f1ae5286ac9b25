"""Backbones, heads, CASA, and the student and teacher of each method."""
