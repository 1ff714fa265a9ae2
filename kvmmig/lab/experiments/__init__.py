"""Experiments: a spec of a grid, a trial for each of its points, a table of figures."""
