"""The demo: a small Stable Diffusion XL pipeline made on the spot, so that everything can be tried offline."""

from accel_hidiff.demo.model import DemoModelConfig, build_pipeline, save_model, tiny_config

__all__ = ["DemoModelConfig", "build_pipeline", "save_model", "tiny_config"]
