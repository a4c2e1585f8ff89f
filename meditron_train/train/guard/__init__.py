"""What is checked around each step: finite numbers, equal replicas, even speed."""
