"""`epd bench`: random checkpoints, load, and figures of each part against a floor measured in the same run."""
