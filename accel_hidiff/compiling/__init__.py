"""Compiling what is missing: `needed` (what some requests need, all of it), `background` (what requests missed), in a
`pool` of `worker` processes that get models without weights (`blueprint`) through `frames`."""
