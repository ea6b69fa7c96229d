"""predictions → results: pure functions over pooled numpy arrays."""
