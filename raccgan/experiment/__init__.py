"""Tables of experiments: several data sets, classes and seeds, resumable."""
