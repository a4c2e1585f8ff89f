"""The command line: one verb, one function. Heavy packages are imported where they are used."""
