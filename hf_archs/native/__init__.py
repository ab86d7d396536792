"""Foreign checkpoint formats in both directions, and the files that accompany a saved checkpoint of this library."""
