"""Pretraining methods by name. A new one is a file with a `Method`, and a line here."""

from models.methods.alice import Alice
from models.methods.caid import CAiD
from models.methods.dino import DINO
from models.methods.method import Method
from models.methods.simsiam import SimSiam
from models.methods.voco import VoCo

METHODS: dict[str, type[Method]] = {"alice": Alice, "simsiam": SimSiam, "dino": DINO, "voco": VoCo, "caid": CAiD}
