"""Phantom images, drawn from a seed and written in the layouts of official archives."""
