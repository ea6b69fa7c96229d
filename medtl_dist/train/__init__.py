"""model → fit: optimiser, precision, loop, evaluation, checkpoints."""
