"""What `benchmarks.gpu` measures: models of the published sizes on one card, their weights drawn there."""
