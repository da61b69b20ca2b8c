"""Masks in, polygons and a road graph out, in flat memory and whatever the cutting."""
