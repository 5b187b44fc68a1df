"""Inference over models that omnistore holds: plans, stages, pipelines. Imports nothing until asked."""
