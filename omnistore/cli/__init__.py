"""The command line: one file per command, found by name and imported when it is asked for."""
