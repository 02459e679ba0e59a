"""What this proxy counts and measures, and how Prometheus reads it."""
