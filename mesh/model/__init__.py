"""Values of the mesh's domain: frozen, parsed at the edge, never re-checked afterwards. Imports nothing of the project."""
