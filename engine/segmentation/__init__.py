"""Finetuning to organs, prediction, and their judgement."""
