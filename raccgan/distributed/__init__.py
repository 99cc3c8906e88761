"""Several ranks as one job: what the ranks compute together, how a process joins the job, and heartbeats."""
