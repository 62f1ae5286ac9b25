"""Scans side by side on a local web page: a place clicked in one is found in the others."""
