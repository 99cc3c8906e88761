"""Where images come from and how they reach a model.

``registry`` names the sources, ``protocol`` splits one into training, held-out and test samples, ``images`` decodes
pixels, and ``dataset`` (the only module here that imports torch) hands them to training and scoring.
Importing this package imports nothing, so that ``--help`` stays fast.
"""
