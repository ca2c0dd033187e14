"""One file per paper: pure functions that a YAML under conf/ names. See docs/architecture.md for the slots."""
