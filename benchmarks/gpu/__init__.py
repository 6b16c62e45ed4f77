"""SDXL in full size, with random weights, on one GPU: everything worth knowing in one short run. See `run`."""
