"""What can be trained: a config, a task and a network call each, and the registry of them."""
