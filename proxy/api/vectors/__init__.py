"""Endpoints that answer with vectors or scores."""
