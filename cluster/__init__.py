"""The only code that imports Ray: it answers the core's questions and launches it."""
