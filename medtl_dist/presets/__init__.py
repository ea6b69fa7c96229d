"""Named whole configs (YAML)."""
