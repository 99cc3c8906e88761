"""Training: the losses, the loop over its steps, and what a run consists of."""
