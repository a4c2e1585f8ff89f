"""The ground floor of every run: typed, frozen configuration, its YAML files and the checks on it."""
