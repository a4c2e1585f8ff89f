"""The report of runs: gathered from all rooms that know something of them, written, or served while they go on."""
