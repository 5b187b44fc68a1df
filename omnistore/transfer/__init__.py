"""The transfer protocol: verified blocks from many peers at once (spec/05-transfer)."""
