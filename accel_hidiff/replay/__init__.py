"""UNet calls that are captured once, at load, and done again as a whole: CUDA graphs.

`capturer` is what a device has to offer, `cuda` offers it; `replays`, above them, knows no device: which call may be
replayed, with what inputs, and when what was captured is given back.
"""

from __future__ import annotations

from accel_hidiff.replay.capturer import Captured, Capturer, capturer_for
from accel_hidiff.replay.inputs import StepInputs
from accel_hidiff.replay.replays import Captures, Replays

__all__ = ["Captured", "Capturer", "Captures", "Replays", "StepInputs", "capturer_for"]
