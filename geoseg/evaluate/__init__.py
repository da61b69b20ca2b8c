"""How good a bundle is on labelled scenes; what trains and what predicts meet here, and no Ray."""
