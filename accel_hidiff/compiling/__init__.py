"""Compiling in processes of its own: `blueprint` (models without weights), `worker` (a process), `pool` (several)."""
