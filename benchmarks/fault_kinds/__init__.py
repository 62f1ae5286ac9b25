"""Faults on purpose: what goes wrong in runs (`runs`) and in inputs (`inputs`); benchmarks/faults.py counts them."""
