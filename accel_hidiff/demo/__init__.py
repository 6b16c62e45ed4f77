"""The demo: small Stable Diffusion XL pipelines, one trained and shipped, so that everything can be tried offline."""

from accel_hidiff.demo.model import DemoModelConfig, build_pipeline, save_model, tiny_config
from accel_hidiff.demo.trained import trained_model

__all__ = ["DemoModelConfig", "build_pipeline", "save_model", "tiny_config", "trained_model"]
