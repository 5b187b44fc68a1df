"""Shipped test support for inference: the contract of engines, and models made of noise to run it on."""
