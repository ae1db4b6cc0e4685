"""The life of one engine: states, readiness, health, diagnosis, and the public ``InferenceServer``."""
