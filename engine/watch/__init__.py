"""Probes and pictures of a pretraining run."""
