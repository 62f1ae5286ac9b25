"""What `benchmarks.gpu_check` measures, and how each item runs in a process of its own."""
