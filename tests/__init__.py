"""The tests. Where there is no GPU the Triton kernels run interpreted.

Triton has to be told so before a kernel is decorated, which importing ``raccgan.kernels`` does: hence here, and not in
a ``conftest.py``, whose own imports come first. What a test starts inherits it, and is not changed by it: ``fused``
never takes a kernel that is interpreted.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
