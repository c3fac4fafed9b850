"""Compressed K/V caches for JAX."""
