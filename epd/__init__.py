"""The shared core of a disaggregated encode / prefill / decode cluster. Importing it imports no torch."""

__version__ = "0.1.0"
