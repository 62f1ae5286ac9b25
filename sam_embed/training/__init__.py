"""How SAM learns: views, their matches, the contrastive loss, the run."""
