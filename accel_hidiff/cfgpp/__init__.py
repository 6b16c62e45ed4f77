"""CFG++ (arXiv 2406.08070): the formulas are in `maths`, the state is in `accel_hidiff.schedulers`."""
