"""The lecture notes' experiments on a trained model, for tools/experiments.py."""
