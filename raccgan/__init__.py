"""RA-CCGAN: residual attention class-conditional GAN for unsupervised image anomaly detection.

The commands are ``python -m raccgan.train``, ``raccgan.evaluate``, ``raccgan.detect`` and ``raccgan.doctor``.
Importing the package imports neither torch nor anything compiled.
"""

__version__ = "0.1.0"
