"""The prefill-decode engine: a library without I/O."""
