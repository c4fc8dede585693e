"""Device meshes, sharding rules, several hosts, and planning a TPU run without a TPU."""
