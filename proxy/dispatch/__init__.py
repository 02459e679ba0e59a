"""Requests among the workers: sent, tried again, answered."""
