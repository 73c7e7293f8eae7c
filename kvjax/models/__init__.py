"""Frozen backbones, and how their weights are read."""
