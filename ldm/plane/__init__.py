"""What serves the plane alone: points, networks of seconds, scores and energies learned by other objectives."""
