"""What operators see: access log, metrics, traces."""
