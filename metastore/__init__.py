"""Who is in the cluster: the roster, and where it learns of workers."""
