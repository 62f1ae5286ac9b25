"""Backbones by name. A new one is a file that fits `models.backbones.interface.Backbone`, and a line here."""

from models.backbones.swin_unetr import SwinUNETRBackbone

BACKBONES = {"swin_unetr": SwinUNETRBackbone}
