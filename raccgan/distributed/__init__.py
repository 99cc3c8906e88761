"""Several ranks as one job: what they compute together, how a process joins, and heartbeats."""
