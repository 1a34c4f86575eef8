"""Presets as YAML files: training recipes. Each is loaded by a test; `--config NAME` takes one by name."""
