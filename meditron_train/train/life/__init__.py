"""The life of a run's process: directory, lock, heartbeat, watchdog, stop signals."""
