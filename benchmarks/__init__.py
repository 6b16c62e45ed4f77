"""Benchmarks of accel_hidiff; see README.md here for how to run each one and RESULTS.md for what came out."""
