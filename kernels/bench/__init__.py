"""``python -m kernels.bench``: each op's error against float64, its speed beside the best library and the machine."""
