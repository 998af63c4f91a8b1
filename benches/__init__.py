"""What the data path costs in CPU time, beside Envoy where it does the same: ``python -m benches``."""
