"""Bytes that survive: journal, index, manifest, lock, publishing. Knows neither documents nor engines."""
