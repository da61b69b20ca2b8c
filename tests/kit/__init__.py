"""What tests need and geoseg does not: servers, scenes, faults."""
