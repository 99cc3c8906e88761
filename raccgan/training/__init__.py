"""Training: the losses, the loop over the steps, and the parts of a run."""
