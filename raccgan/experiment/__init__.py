"""Tables of experiments over data sets, classes and seeds, which a second call continues."""
