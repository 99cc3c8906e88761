"""Qualification: which backend of an op is right, and fastest, on the device that is there.

No machine of ours has every GPU, so each tries the kernels on itself, before ``--kernels fused`` takes them:

=========== ===========================================================================================
record      the calls of a training step or a score, listed on tensors without data
trial       one call by one backend: values, gradients and second derivatives beside float64, and times
worker      a child process that tries class after class; a kernel that crashes or hangs takes the child
run         starts children, reads what they find, and writes it down as they go
cache       the file in which that is kept: of one device, driver, PyTorch and build of the kernels
table       what :mod:`raccgan.kernels.dispatch` looks a call up in
=========== ===========================================================================================
"""
