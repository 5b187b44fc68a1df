"""HTTP on this machine: a small server and what it serves (spec/05-transfer, "The trustless gateway")."""
