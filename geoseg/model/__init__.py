"""Logits from images: the networks, their normalisation and the bundle that carries them. Knows torch, not rasterio."""
