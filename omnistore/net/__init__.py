"""The network: its interface, and the adapter that alone imports libp2p."""
