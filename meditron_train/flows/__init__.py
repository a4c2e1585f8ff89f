"""What orchestrates several rooms: the demo, submitting, the preflight check, the doctor."""
