"""Where a request goes: which endpoint, over which connection, and what its failures teach about it."""
