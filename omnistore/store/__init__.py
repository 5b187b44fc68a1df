"""Where blocks live: the store's interface, the SQLite-indexed file store, and one in memory."""
