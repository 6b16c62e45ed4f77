"""The comparison that decides: this project beside its peers, over named scenarios (`python -m benchmarks.compare`)."""
