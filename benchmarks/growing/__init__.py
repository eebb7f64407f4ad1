"""What `benchmarks.growth` measures: jobs that grow, and a server whose queue does."""
