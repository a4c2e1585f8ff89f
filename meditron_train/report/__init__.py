"""What a run leaves for people: metrics, TensorBoard, W&B, and where every number came from."""
