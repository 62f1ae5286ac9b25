"""Pretraining methods by name. A new one is a file with a `Method`, and a line here."""

from models.methods.alice import Alice
from models.methods.method import Method

METHODS: dict[str, type[Method]] = {"alice": Alice}
