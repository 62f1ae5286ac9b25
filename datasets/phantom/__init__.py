"""A synthetic torso CT with known truth."""
