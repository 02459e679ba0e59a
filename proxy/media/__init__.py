"""Pictures of requests: where they come from, and what they cost."""
