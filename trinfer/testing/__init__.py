"""Engines that fail on demand: real programs, for trinfer's own tests and for those of its users."""
