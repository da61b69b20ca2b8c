"""From scenes to published masks, step by step; joins raster and model, knows no Ray."""
