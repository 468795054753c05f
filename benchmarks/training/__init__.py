"""What `benchmarks/train.py` is made of: jobs and rows, the sides that train, the ratios, the profile."""
