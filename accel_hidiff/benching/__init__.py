"""`accel-hidiff bench`: every backend that this machine has, over the same UNet calls, in turns.

`options` is what was asked for. `turns` runs it: one process for each backend (`worker`, which holds a `contestant`),
of which one works while the others wait. `report` is what came of it, `command` puts it together.
"""
