"""A run's weights for others: what they must know, a model card, and the folder that goes to the Hugging Face hub."""
