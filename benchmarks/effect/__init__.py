"""What HiDiffusion and CFG++ do to a picture, counted: see `__main__`."""
