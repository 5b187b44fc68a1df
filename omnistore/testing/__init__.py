"""Shipped test support: contract suites, a virtual network, faulty peers, tiny GGUF files."""
