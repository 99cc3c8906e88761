"""Images and their labels: ``sources`` lists them, ``splits`` divides them, ``images`` decodes, ``dataset`` serves."""
