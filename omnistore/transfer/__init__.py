"""Moving verified blocks between peers: pure decisions, thin shells around them (spec/05-transfer)."""
