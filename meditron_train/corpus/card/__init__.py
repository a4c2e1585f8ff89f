"""Describing a finished corpus to people and machines."""
