"""Several processes, one training: ranks, sums over them, and their heartbeat."""
