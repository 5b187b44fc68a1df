"""Content-addressed storage and distribution of model weights between peers.

The map, from the ground up (each imports only from those before it):

    errors  cid  dagcbor  block          words and bytes
    manifest  keys  selection            what a model is, who says so, which parts of it
    chunker.{ggml,gguf,layout}           how a GGUF's bytes map to parts, extents and blocks (pure)
    transfer.{messages,window,session,serve}  dht.{records,schedule}    protocol decisions (pure)
    store net dht.service chunker.{cut,join}  transfer.{client,server,web,bitswap_server} config  the shells
    node                                 one running node: the composition root
    http                                 the gateway for IPFS programs, the API of a running seed, its metrics
    cli                                  the command line; loads the rest lazily

This package never imports `omninfer`. Importing it imports nothing else.
"""

__version__ = "0.1.0"
