"""What waypoints are told: pure functions from objects to the values of `mesh.model.l7`."""
