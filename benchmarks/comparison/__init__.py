"""The parts of benchmarks/compare_pretraining.py: settings, jobs, stages, statistics, figure."""
