"""The GPU side of the cluster: encoder and prefill-decode workers, and the engine inside the latter."""
