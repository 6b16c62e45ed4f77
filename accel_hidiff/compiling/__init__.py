"""Compiling what is missing: `needed` (what some requests need, all of it), `background` (what requests missed), in a
`pool` of `worker` processes that get models without weights (`blueprint`). `child` and `frames` are the two ends of the
pipe to such a process; `accel_hidiff.benching` has processes at it, too."""
