"""The HTTP service of a deploy file, and the reference for how to embed the plugin.

`requests` and `refusal` say what may be asked and how it is refused (no torch, no web framework), `engine` owns one
pipeline in one thread, `service` all of them, `app` speaks HTTP, `command` is a process that serves.
"""
