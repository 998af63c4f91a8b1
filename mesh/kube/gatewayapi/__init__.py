"""The Kubernetes Gateway API: its kinds as we read them."""
