"""The agent's side of the CNI plugin: its entry in the node's chain of plugins, its files, and what it asks."""
