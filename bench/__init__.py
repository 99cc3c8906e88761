"""The benchmarks: ``pytest bench/ --benchmark-only``, a few minutes; every case with ``--full``.

Each case runs ours and what a user would otherwise pick on the same tensors in one run, after their outputs were
checked against float64. Machines differ and are noisy: only ratios within one run count.

========================= ========================================================================================
layers.py, networks.py    the shapes: every layer of the two published models, and their networks
roofline.py               what a case must at least compute and move, and how fast this machine can do either
peers.py                  who takes part in an op's case, on which inputs, in which pass
engines.py                who else runs an exported model: ``pip install -e '.[test]'``
measure.py                the check, then the timing
machine.py                its name, cache and clock; where it is not quiet, measure with ``--threads 1``
results.py, picture.py    the table and its picture, in results/ with ``--save-results``
test_<op>.py              the cases: each op,
test_step, test_scorer    the whole training step, the whole scorer
test_ranks                the training step divided among two ranks
========================= ========================================================================================
"""
