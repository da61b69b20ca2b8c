"""From labels to a network that has learnt them, step by step; joins raster and model, knows no Ray."""
