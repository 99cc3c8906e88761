"""Images and their labels: from files to tensors.

``sources`` lists the images of each data set, ``splits`` divides them into training, held-out and test samples,
``images`` decodes pixels, and ``dataset`` serves them as tensors. Importing this package imports nothing, so that
``--help`` stays fast.
"""
