"""Backbones, heads, CASA, the student and teacher of each method, and segmentation networks for finetuning."""

from models.pretrained import load_pretrained

__all__ = ["load_pretrained"]
