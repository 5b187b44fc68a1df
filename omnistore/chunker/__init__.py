"""From GGUF files to blocks and back: reading headers, planning the layout, cutting and joining."""
