"""Compiling for a GPU on a machine that has none.

AOTInductor asks the device, the driver and Triton's driver for facts while it compiles, and never needs to run
anything: `session` gives it these facts from a `Target`. Weights and inputs are fake CUDA tensors, which have a shape
and no memory. What the device would have decided by running is decided by rules that are written down: which attention
kernel (`attention`), and which configuration of each Triton kernel (`choosing`).

torch has an experimental way of its own, `torch.compile(...).aot_compile()` on fake tensors (2.13). It is not what this
stands on: its artifact is a Python callable with guards, loaded by unpickling, made for one set of weights' tensors by
Dynamo, and it asks for the same device facts while Inductor compiles. AOTInductor's packages are native, weightless and
bound by name.

A session changes what torch and Triton answer in the whole process, so that it belongs into a compiling process
(`accel_hidiff.compiling.worker`), never into one that serves.
"""

from __future__ import annotations
