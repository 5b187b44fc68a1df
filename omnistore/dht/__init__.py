"""Discovery: who holds which part, by way of a Kademlia DHT (spec/04-discovery)."""
