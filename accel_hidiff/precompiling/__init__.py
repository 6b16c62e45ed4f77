"""A deploy file, compiled: `plan` (what it needs), `check`, `estimate`, `run` (the work), `table` (while it runs)."""
